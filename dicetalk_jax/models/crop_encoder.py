"""Face crops to frame features (not in the paper).

The emotion embedder reads them where there are no 3DMM fits.
"""

import itertools
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from dicetalk_jax.models.layers import GroupNorm
from dicetalk_jax.models.resnet import Conv3x3

GROUP = 8  # channels that are normalised together
TIME_CHUNK = 64  # frames of every clip whose activations are in memory at a time


class CropEncoder(nnx.Module):
  """Strided convolutions, frame by frame, and the mean over the remaining pixels."""

  def __init__(
    self,
    channels: tuple[int, ...],
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    self.convs: nnx.List[nnx.Conv] = nnx.List([])
    self.norms: nnx.List[GroupNorm] = nnx.List([])
    for cin, cout in itertools.pairwise((3, *channels)):
      groups = math.gcd(GROUP, cout)
      self.convs.append(Conv3x3(cin, cout, strides=2, dtype=dtype, rngs=rngs))
      self.norms.append(
        GroupNorm(cout, num_groups=None, group_size=groups, dtype=dtype, rngs=rngs)
      )
    self.dtype = dtype or jnp.float32

  def __call__(self, crops: UInt8[Array, 'B N S S 3']) -> Float[Array, 'B N features']:
    """Encodes crops to the channels of the last convolution.

    The activations of 192 clips of 256 frames of 64 pixels would take tens of gigabytes
    in the backward pass. So longer clips are processed in chunks whose activations are
    recomputed there. Clips stay next to each other, as the mesh has them. (Up to one
    chunk there is no loop: gradients of convolutions inside a loop are very slow on the
    CPU.)
    """
    clips, frames, *image = crops.shape
    chunks = -(-frames // TIME_CHUNK)
    if chunks == 1:
      return self._encode(crops)
    length = -(-frames // chunks)
    padding = ((0, 0), (0, chunks * length - frames), (0, 0), (0, 0), (0, 0))
    padded = jnp.pad(crops, padding).reshape(clips, chunks, length, *image)
    encode = jax.checkpoint(self._encode, prevent_cse=False)
    features = jax.lax.map(encode, jnp.moveaxis(padded, 1, 0))
    features = jnp.moveaxis(features, 0, 1).reshape(clips, chunks * length, -1)
    return features[:, :frames]

  def _encode(self, crops: UInt8[Array, 'B T S S 3']) -> Float[Array, 'B T features']:
    """Encodes a few frames of every clip at once."""
    x = crops.reshape(-1, *crops.shape[2:]).astype(self.dtype) / 127.5 - 1
    for conv, norm in zip(self.convs, self.norms):
      x = nnx.silu(norm(conv(x)))
    return x.mean(axis=(1, 2)).reshape(*crops.shape[:2], -1)

"""Face crops to frame features: what the emotion embedder reads where there are no
3DMM fits (not in the paper).
"""

import itertools
import math

from flax import nnx
import jax
import jax.numpy as jnp

from dicetalk_jax.models.layers import GroupNorm
from dicetalk_jax.models.resnet import Conv3x3

GROUP = 8  # channels that are normalised together
TIME_CHUNK = 64  # frames of every clip whose activations are in memory at a time


class CropEncoder(nnx.Module):
  """Strided convolutions, frame by frame, and the mean over what is left of the
  picture.
  """

  def __init__(self, channels: tuple[int, ...], *, dtype=None, rngs):
    self.convs, self.norms = nnx.List([]), nnx.List([])
    for cin, cout in itertools.pairwise((3, *channels)):
      self.convs.append(Conv3x3(cin, cout, strides=2, dtype=dtype, rngs=rngs))
      self.norms.append(
        GroupNorm(cout, None, math.gcd(GROUP, cout), dtype=dtype, rngs=rngs)
      )
    self.dtype = dtype or jnp.float32

  def __call__(self, crops: jax.Array) -> jax.Array:
    """crops uint8 `[B,N,S,S,3]`; returns `[B,N,channels[-1]]`.

    The activations of 192 clips of 256 frames of 64 pixels would take tens of gigabytes
    in the backward pass. So longer clips are walked through in chunks whose activations
    are recomputed there. Clips stay side by side, as the mesh has them. (Up to one
    chunk there is no loop: gradients of convolutions inside of one are very slow on the
    CPU.)
    """
    clips, frames, *picture = crops.shape
    chunks = -(-frames // TIME_CHUNK)
    if chunks == 1:
      return self._encode(crops)
    length = -(-frames // chunks)
    padded = jnp.pad(crops, ((0, 0), (0, chunks * length - frames), *[(0, 0)] * 3))
    walked = jnp.moveaxis(padded.reshape(clips, chunks, length, *picture), 1, 0)
    features = jax.lax.map(jax.checkpoint(self._encode, prevent_cse=False), walked)
    return jnp.moveaxis(features, 0, 1).reshape(clips, chunks * length, -1)[:, :frames]

  def _encode(self, crops: jax.Array) -> jax.Array:
    """A few frames of every clip: uint8 `[B,T,S,S,3]` to `[B,T,channels[-1]]`."""
    x = crops.reshape(-1, *crops.shape[2:]).astype(self.dtype) / 127.5 - 1
    for conv, norm in zip(self.convs, self.norms):
      x = nnx.silu(norm(conv(x)))
    return x.mean(axis=(1, 2)).reshape(*crops.shape[:2], -1)

"""RIFE HDv3 (Huang et al., arXiv 2011.06294): the frame halfway between two frames.

Published name `flownet`. Three blocks, coarse to fine, estimate two flows, from the
middle to either frame, and a blending mask.
"""

from collections.abc import Callable
import dataclasses
import functools
import typing
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models.layers import PReLU
from dicetalk_jax.models.parameters import ModelConfig

SCALES = (4, 2, 1)  # of the blocks, coarse to fine
# Height and width must be multiples of it: the coarsest block halves its image twice.
MULTIPLE = 4 * max(SCALES)


@dataclasses.dataclass(frozen=True)
class RIFEConfig(ModelConfig):
  """Size of the network.

  Attributes:
    c: width of a block; the published file has 90.
  """

  c: int = 90


def _conv(
  cin: int, cout: int, strides: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs
) -> nnx.List[Any]:
  """Convolution and rectifier, numbered as in the published file."""
  conv = nnx.Conv(cin, cout, (3, 3), strides=strides, padding=1, dtype=dtype, rngs=rngs)
  return nnx.List([conv, PReLU(cout)])


def _deconv(
  cin: int, cout: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
) -> nnx.ConvTranspose:
  """Transposed convolution that doubles height and width.

  `transpose_kernel` stores the kernel `[4,4,cout,cin]`, as PyTorch does, so the naming
  rule needs no exception. SAME is PyTorch's padding of 1 here.
  """
  return nnx.ConvTranspose(
    cin,
    cout,
    (4, 4),
    strides=(2, 2),
    padding='SAME',
    transpose_kernel=True,
    dtype=dtype,
    rngs=rngs,
  )


def _chain(layers: nnx.List[Any], x: Array) -> Array:
  """Applies layers, and lists of layers, one after the other."""
  for layer in layers:
    x = _chain(layer, x) if isinstance(layer, nnx.List) else layer(x)
  return x


def resize(x: Float[Array, 'B H W C'], factor: float) -> Float[Array, 'B _ _ C']:
  """Scales height and width by a factor.

  Bilinear, pixels are areas, no antialiasing (PyTorch's default).
  """
  if factor == 1:
    return x
  batch, height, width, channels = x.shape
  shape = batch, int(height * factor), int(width * factor), channels
  resized: Array = jax.image.resize(x, shape, 'bilinear', antialias=False)
  return resized


def warp(
  image: Float[Array, 'B H W C'], flow: Float[Array, 'B H W 2']
) -> Float[Array, 'B H W C']:
  """Fetches every pixel from where the flow points: bilinear, the border repeated.

  Args:
    image: what is warped.
    flow: offsets in x and y, in pixels.
  """
  batch, height, width, channels = image.shape
  x = jnp.clip(jnp.arange(width) + flow[..., 0], 0, width - 1)
  y = jnp.clip(jnp.arange(height)[:, None] + flow[..., 1], 0, height - 1)
  left = jnp.floor(x)
  top = jnp.floor(y)
  flat = image.reshape(batch, -1, channels)

  def pixel(row: Array, column: Array) -> Array:
    index = jnp.minimum(row, height - 1) * width + jnp.minimum(column, width - 1)
    index = index.astype(jnp.int32).reshape(batch, -1, 1)
    return jnp.take_along_axis(flat, index, axis=1).reshape(image.shape)

  right = (x - left)[..., None]
  down = (y - top)[..., None]
  above = pixel(top, left) * (1 - right) + pixel(top, left + 1) * right
  below = pixel(top + 1, left) * (1 - right) + pixel(top + 1, left + 1) * right
  return above * (1 - down) + below * down


class IFBlock(nnx.Module):
  """Corrections of flows and mask, estimated on an image that is scaled down."""

  def __init__(
    self, cin: int, c: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    conv = functools.partial(_conv, dtype=dtype, rngs=rngs)
    deconv = functools.partial(_deconv, dtype=dtype, rngs=rngs)

    def pair() -> nnx.List[Any]:
      return nnx.List([conv(c, c, 1), conv(c, c, 1)])

    def upsample(cout: int) -> nnx.List[Any]:
      return nnx.List([deconv(c, c // 2), PReLU(c // 2), deconv(c // 2, cout)])

    self.conv0 = nnx.List([conv(cin, c // 2, 2), conv(c // 2, c, 2)])
    self.convblock0 = pair()
    self.convblock1 = pair()
    self.convblock2 = pair()
    self.convblock3 = pair()
    self.conv1 = upsample(4)
    self.conv2 = upsample(1)

  def __call__(
    self,
    x: Float[Array, 'B H W cin'],
    flow: Float[Array, 'B H W 4'],
    scale: int,
  ) -> tuple[Float[Array, 'B H W 4'], Float[Array, 'B H W 1']]:
    """Estimates corrections of flow and mask.

    Args:
      x: both frames and the mask, 7 channels.
      flow: the estimate so far.
      scale: by how much the block's image is smaller.
    """
    x = resize(jnp.concatenate([x, flow / scale], axis=-1), 1 / scale)
    x = _chain(self.conv0, x)
    for block in (self.convblock0, self.convblock1, self.convblock2, self.convblock3):
      x = x + _chain(block, x)
    flow_change = resize(_chain(self.conv1, x), scale) * scale
    mask_change = resize(_chain(self.conv2, x), scale)
    return flow_change, mask_change


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX also builds it of NumPy arrays
class Halfway:
  """The estimate of a block.

  Attributes:
    flow: to both frames in pixels (x, y, x, y).
    share: the first frame's share, in (0, 1).
    frame: the frame between.
  """

  flow: Float[Array, 'B H W 4']
  share: Float[Array, 'B H W 1']
  frame: Float[Array, 'B H W 3']


def _swapped(flow: Float[Array, 'B H W 4']) -> Float[Array, 'B H W 4']:
  """Exchanges the flows to the first and to the second frame."""
  return jnp.roll(flow, 2, axis=-1)


class IFNet(nnx.Module):
  """The interpolation network."""

  def __init__(
    self, config: RIFEConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    block = functools.partial(IFBlock, c=config.c, dtype=dtype, rngs=rngs)
    frames_mask_flow = 3 + 3 + 1 + 4
    self.block0 = block(frames_mask_flow)
    self.block1 = block(frames_mask_flow)
    self.block2 = block(frames_mask_flow)
    # The teacher of RIFE's training, which also sees the true frame. Nothing here uses
    # it (so no program contains it); it stays, because the reference implementation
    # refuses a file without it.
    self.block_tea = block(frames_mask_flow + 3)

  def __call__(
    self, first: Float[Array, 'B H W 3'], second: Float[Array, 'B H W 3']
  ) -> tuple[Halfway, ...]:
    """Estimates the frame between two frames.

    Args:
      first, second: frames in [0,1]; height and width are multiples of `MULTIPLE`.

    Returns:
      The estimate of each block; the last one is the finest.
    """
    batch, height, width, _ = first.shape
    if height % MULTIPLE or width % MULTIPLE:
      raise ValueError(
        f'height and width must be multiples of {MULTIPLE}, not {(height, width)}'
      )
    flow = jnp.zeros((batch, height, width, 4), first.dtype)
    mask = jnp.zeros((batch, height, width, 1), first.dtype)
    warped_first = first
    warped_second = second
    stages = []
    for block, scale in zip((self.block0, self.block1, self.block2), SCALES):
      # 1. Run the block in both directions of time.
      forward = jnp.concatenate([warped_first, warped_second, mask], -1)
      backward = jnp.concatenate([warped_second, warped_first, -mask], -1)
      flow_changes, mask_changes = block(
        jnp.concatenate([forward, backward]),
        jnp.concatenate([flow, _swapped(flow)]),
        scale,
      )

      # 2. Correct flow and mask by the mean of both.
      flow_forward, flow_backward = jnp.split(flow_changes, 2)
      mask_forward, mask_backward = jnp.split(mask_changes, 2)
      flow = flow + (flow_forward + _swapped(flow_backward)) / 2
      mask = mask + (mask_forward - mask_backward) / 2

      # 3. Warp both frames to the middle, and blend them.
      warped_first = warp(first, flow[..., :2])
      warped_second = warp(second, flow[..., 2:])
      share = nnx.sigmoid(mask)
      frame = warped_first * share + warped_second * (1 - share)
      stages.append(Halfway(flow, share, frame))
    return tuple(stages)


def _unchanged(x: Array) -> Array:
  return x


def double(
  model: IFNet,
  frames: Float[Array, 'N H W 3'],
  pairs: int = 10,
  spread: Callable[[Array], Array] = _unchanged,
) -> Float[Array, '2*N-1 H W 3']:
  """Puts a frame between every two of a clip.

  Args:
    model: the network.
    frames: in [0,1], at least 2; sides that do not fit the network are extended for it.
    pairs: how many are computed together, to bound memory.
    spread: lays an array of pairs out over devices.

  Returns:
    The given frames, unchanged, and those between, within [0,1].
  """
  # 1. Pad the pairs to whole batches, and the sides to what the network takes.
  count, height, width, channels = frames.shape
  between_count = count - 1
  pairs = min(pairs, between_count)
  calls = -(-between_count // pairs)
  padding = (
    (0, calls * pairs - between_count),
    (0, -height % MULTIPLE),
    (0, -width % MULTIPLE),
    (0, 0),
  )
  first = jnp.pad(frames[:-1], padding, mode='edge')
  second = jnp.pad(frames[1:], padding, mode='edge')

  # 2. Interpolate batch by batch.
  def interpolate(batch: tuple[Array, Array]) -> Array:
    first, second = batch
    finest = model(spread(first), spread(second))[-1]
    return finest.frame

  def batched(x: Array) -> Array:
    return x.reshape(calls, pairs, *x.shape[1:])

  between = lax.map(interpolate, (batched(first), batched(second)))
  between = between.reshape(first.shape)[:between_count, :height, :width]

  # 3. Weave the new frames between the given ones.
  woven = jnp.stack([frames[:-1], jnp.clip(between, 0, 1)], axis=1)
  woven = woven.reshape(2 * between_count, height, width, channels)
  return jnp.concatenate([woven, frames[-1:]])

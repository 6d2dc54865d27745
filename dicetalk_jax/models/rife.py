"""RIFE HDv3 (Huang et al., arXiv 2011.06294): the frame halfway between two frames.

Published name `flownet`.

Two flows, from the middle to either frame, and a blending mask are estimated coarse to
fine by three blocks.
"""

from collections.abc import Callable
import dataclasses

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from dicetalk_jax.models.parameters import ModelConfig

SCALES = (4, 2, 1)  # of the blocks, coarse to fine
MULTIPLE = 4 * max(
  SCALES
)  # height and width: the coarsest block halves its picture twice


@dataclasses.dataclass(frozen=True)
class RIFEConfig(ModelConfig):
  """`c`: width of a block; the published file has 90."""

  c: int = 90


class PReLU(nnx.Module):
  """Rectifier with one learned slope per channel for negative values."""

  def __init__(self, channels: int):
    self.negative_slope = nnx.Param(jnp.full(channels, 0.25, jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    return jnp.where(x >= 0, x, self.negative_slope[...].astype(x.dtype) * x)


def _conv(cin: int, cout: int, strides: int, **kwargs) -> nnx.List:
  """Convolution and rectifier, numbered as in the published file."""
  return nnx.List(
    [nnx.Conv(cin, cout, (3, 3), strides=strides, padding=1, **kwargs), PReLU(cout)]
  )


def _deconv(cin: int, cout: int, **kwargs) -> nnx.ConvTranspose:
  """Doubles height and width. `transpose_kernel` keeps the kernel as that of the
  convolution which it transposes,
  `[4,4,cout,cin]`, as PyTorch does: the naming rule needs no exception. SAME is
  PyTorch's padding of 1 here.
  """
  return nnx.ConvTranspose(
    cin, cout, (4, 4), strides=(2, 2), padding='SAME', transpose_kernel=True, **kwargs
  )


def _chain(layers: nnx.List, x: jax.Array) -> jax.Array:
  for layer in layers:
    x = _chain(layer, x) if isinstance(layer, nnx.List) else layer(x)
  return x


def resize(x: jax.Array, factor: float) -> jax.Array:
  """x `[B,H,W,C]` by a factor: bilinear, pixels are areas, no antialiasing
  (PyTorch's default).
  """
  if factor == 1:
    return x
  batch, height, width, channels = x.shape
  shape = batch, int(height * factor), int(width * factor), channels
  return jax.image.resize(x, shape, 'bilinear', antialias=False)


def warp(image: jax.Array, flow: jax.Array) -> jax.Array:
  """Fetches every pixel from where the flow points: bilinear, the border repeated.

  Args:
    image: `[B,H,W,C]`.
    flow: `[B,H,W,2]`, offsets in x and y, in pixels.

  Returns:
    `[B,H,W,C]`.
  """
  batch, height, width, channels = image.shape
  x = jnp.clip(jnp.arange(width) + flow[..., 0], 0, width - 1)
  y = jnp.clip(jnp.arange(height)[:, None] + flow[..., 1], 0, height - 1)
  left, top = jnp.floor(x), jnp.floor(y)
  flat = image.reshape(batch, -1, channels)

  def pixel(row, column):
    index = jnp.minimum(row, height - 1) * width + jnp.minimum(column, width - 1)
    index = index.astype(jnp.int32).reshape(batch, -1, 1)
    return jnp.take_along_axis(flat, index, axis=1).reshape(image.shape)

  right, down = (x - left)[..., None], (y - top)[..., None]
  above = pixel(top, left) * (1 - right) + pixel(top, left + 1) * right
  below = pixel(top + 1, left) * (1 - right) + pixel(top + 1, left + 1) * right
  return above * (1 - down) + below * down


class IFBlock(nnx.Module):
  """Corrections of flows and mask, estimated on a picture scaled down."""

  def __init__(self, cin: int, c: int, **kwargs):
    def pair():
      return nnx.List([_conv(c, c, 1, **kwargs), _conv(c, c, 1, **kwargs)])

    def up(cout):
      return nnx.List(
        [_deconv(c, c // 2, **kwargs), PReLU(c // 2), _deconv(c // 2, cout, **kwargs)]
      )

    self.conv0 = nnx.List(
      [_conv(cin, c // 2, 2, **kwargs), _conv(c // 2, c, 2, **kwargs)]
    )
    self.convblock0 = pair()
    self.convblock1 = pair()
    self.convblock2 = pair()
    self.convblock3 = pair()
    self.conv1 = up(4)
    self.conv2 = up(1)

  def __call__(
    self, x: jax.Array, flow: jax.Array, scale: int
  ) -> tuple[jax.Array, jax.Array]:
    """x `[B,H,W,7]` (both pictures and the mask), flow `[B,H,W,4]`; returns
    `[B,H,W,4]` and `[B,H,W,1]`.
    """
    x = _chain(
      self.conv0, resize(jnp.concatenate([x, flow / scale], axis=-1), 1 / scale)
    )
    for block in (self.convblock0, self.convblock1, self.convblock2, self.convblock3):
      x = x + _chain(block, x)
    return resize(_chain(self.conv1, x), scale) * scale, resize(
      _chain(self.conv2, x), scale
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halfway:
  """What a block knows: flows to both frames in pixels (x, y, x, y), the first
  frame's share, the frame between.
  """

  flow: jax.Array  # [B,H,W,4]
  share: jax.Array  # [B,H,W,1] in (0, 1)
  frame: jax.Array  # [B,H,W,3]


def _swapped(flow: jax.Array) -> jax.Array:
  return jnp.roll(flow, 2, axis=-1)


class IFNet(nnx.Module):
  """The interpolation network."""

  def __init__(self, config: RIFEConfig, *, dtype=None, rngs):
    pictures_mask_flow = 3 + 3 + 1 + 4

    def block(cin):
      return IFBlock(cin, config.c, dtype=dtype, rngs=rngs)

    self.block0 = block(pictures_mask_flow)
    self.block1 = block(pictures_mask_flow)
    self.block2 = block(pictures_mask_flow)
    # The teacher of RIFE's training, which also sees the true frame. Nothing here uses
    # it (so no program contains it); it stays, because the published program refuses a
    # file without it.
    self.block_tea = block(pictures_mask_flow + 3)

  def __call__(self, first: jax.Array, second: jax.Array) -> tuple[Halfway, ...]:
    """Frames `[B,H,W,3]` in [0,1] with sides that are multiples of `MULTIPLE`; the
    last result is the finest.
    """
    if first.shape[1] % MULTIPLE or first.shape[2] % MULTIPLE:
      raise ValueError(
        f'height and width must be multiples of {MULTIPLE}, not {first.shape[1:3]}'
      )
    flow, mask = (
      jnp.zeros((*first.shape[:3], 4), first.dtype),
      jnp.zeros((*first.shape[:3], 1), first.dtype),
    )
    warped, stages = (first, second), []
    for block, scale in zip((self.block0, self.block1, self.block2), SCALES):
      # Both directions of time are evaluated, and averaged.
      forth, back = (
        jnp.concatenate([*warped, mask], -1),
        jnp.concatenate([*warped[::-1], -mask], -1),
      )
      flows, masks = block(
        jnp.concatenate([forth, back]), jnp.concatenate([flow, _swapped(flow)]), scale
      )
      (forth, back), (plus, minus) = jnp.split(flows, 2), jnp.split(masks, 2)
      flow, mask = flow + (forth + _swapped(back)) / 2, mask + (plus - minus) / 2
      warped = warp(first, flow[..., :2]), warp(second, flow[..., 2:])
      share = nnx.sigmoid(mask)
      stages.append(Halfway(flow, share, warped[0] * share + warped[1] * (1 - share)))
    return tuple(stages)


def double(
  model: IFNet,
  frames: jax.Array,
  pairs: int = 10,
  spread: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
  """Puts a frame between every two of a clip.

  Args:
    model: the network.
    frames: `[N,H,W,3]` in [0,1], N at least 2; sides that do not fit the network are
      extended for it.
    pairs: how many are computed together, to bound memory.
    spread: lays an array of pairs out over devices.

  Returns:
    `[2N-1,H,W,3]`: the given frames, unchanged, and those between, within [0,1].
  """
  count, height, width, _ = frames.shape
  pairs = min(pairs, count - 1)
  calls = -(-(count - 1) // pairs)
  padding = (
    (0, calls * pairs - (count - 1)),
    (0, -height % MULTIPLE),
    (0, -width % MULTIPLE),
    (0, 0),
  )
  first, second = (jnp.pad(x, padding, mode='edge') for x in (frames[:-1], frames[1:]))

  def call(batch):
    first, second = batch
    return model(spread(first), spread(second))[-1].frame

  batches = tuple(x.reshape(calls, pairs, *x.shape[1:]) for x in (first, second))
  between = lax.map(call, batches).reshape(first.shape)[: count - 1, :height, :width]
  woven = jnp.stack([frames[:-1], jnp.clip(between, 0, 1)], axis=1).reshape(
    -1, *frames.shape[1:]
  )
  return jnp.concatenate([woven, frames[-1:]])

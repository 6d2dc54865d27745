"""TAESDV, the tiny video autoencoder of Ollin Boer Bohan (MIT): latents to previews.

Published name `taesdv`. It was trained to imitate the autoencoder of Stable Diffusion:
its latents are those that the network denoises, multiplied by the scaling factor. Where
that has blocks that see all frames of a chunk, this one remembers: each block of the
decoder sees its own input of the frame before.

Source: the published program, https://github.com/madebyollin/taesdv.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models.parameters import ModelConfig

# Latents are squeezed softly into this range.
LIMIT = 3.0


@dataclasses.dataclass(frozen=True)
class TAESDVConfig(ModelConfig):
  """Sizes of the network; the defaults are those of the published file.

  Attributes:
    latent_channels: of latents.
    channels: of all layers.
    levels: how often height and width are doubled.
    blocks: residual blocks before each doubling, and after each halving.
  """

  latent_channels: int = 4
  channels: int = 64
  levels: int = 3
  blocks: int = 3

  @property
  def factor(self) -> int:
    """How many pixels a latent is wide."""
    return int(2**self.levels)


class Clamp(nnx.Module):
  """Squeezes latents into (-`LIMIT`, `LIMIT`)."""

  def __call__(self, x: Float[Array, '*shape']) -> Float[Array, '*shape']:
    return jnp.tanh(x / LIMIT) * LIMIT


class Rectifier(nnx.Module):
  """max(x, 0), a member of the published lists of layers."""

  def __call__(self, x: Float[Array, '*shape']) -> Float[Array, '*shape']:
    return nnx.relu(x)


class Double(nnx.Module):
  """Doubles height and width: nearest neighbour."""

  def __call__(self, x: Float[Array, '*rows H W C']) -> Float[Array, '*rows 2*H 2*W C']:
    return x.repeat(2, axis=-3).repeat(2, axis=-2)


def _conv(
  cin: int,
  cout: int,
  *,
  strides: int = 1,
  use_bias: bool = True,
  dtype: DTypeLike | None,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  return nnx.Conv(
    cin,
    cout,
    (3, 3),
    strides=strides,
    padding=1,
    use_bias=use_bias,
    dtype=dtype,
    rngs=rngs,
  )


class Block(nnx.Module):
  """Three convolutions, with rectifiers between them, and a residual."""

  def __init__(
    self, cin: int, cout: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    conv = functools.partial(_conv, dtype=dtype, rngs=rngs)
    self.conv = nnx.List(
      [conv(cin, cout), Rectifier(), conv(cout, cout), Rectifier(), conv(cout, cout)]
    )

  def __call__(
    self, x: Float[Array, '*rows H W cin'], residual: Float[Array, '*rows H W C']
  ) -> Float[Array, '*rows H W C']:
    for layer in self.conv:
      x = layer(x)
    out: Array = nnx.relu(x + residual)
    return out


class MemoryBlock(Block):
  """A block that also sees its input of the frame before."""

  def __init__(self, channels: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
    super().__init__(2 * channels, channels, dtype=dtype, rngs=rngs)

  def remember(
    self, x: Float[Array, 'B F H W C'], before: Float[Array, 'B 1 H W C']
  ) -> tuple[Float[Array, 'B F H W C'], Float[Array, 'B 1 H W C']]:
    """Computes frames, and what the next ones will see of them.

    Args:
      x: input of some frames.
      before: that of the frame before them, zero if they are the first.
    """
    memory = jnp.concatenate([before.astype(x.dtype), x[:, :-1]], axis=1)
    return self(jnp.concatenate([x, memory], axis=-1), x), x[:, -1:]


class TAESDV(nnx.Module):
  """The decoder, and the parameters of the encoder.

  Nothing here encodes: portraits are encoded by the autoencoder that the network was
  trained with. The encoder's parameters stay because the published program refuses a
  file without them.
  """

  def __init__(
    self, config: TAESDVConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    self.config = config
    width = config.channels
    conv = functools.partial(_conv, dtype=dtype, rngs=rngs)
    block = functools.partial(Block, width, width, dtype=dtype, rngs=rngs)
    memory_block = functools.partial(MemoryBlock, width, dtype=dtype, rngs=rngs)

    encoder: list[nnx.Module] = [conv(3, width), block()]
    for _ in range(config.levels):
      encoder.append(conv(width, width, strides=2, use_bias=False))
      encoder += [block() for _ in range(config.blocks)]
    encoder.append(conv(width, config.latent_channels))
    self.encoder = nnx.List(encoder)

    decoder: list[nnx.Module] = [
      Clamp(),
      conv(config.latent_channels, width),
      Rectifier(),
    ]
    for _ in range(config.levels):
      decoder += [memory_block() for _ in range(config.blocks)]
      decoder += [Double(), conv(width, width, use_bias=False)]
    decoder += [memory_block(), conv(width, 3)]
    self.decoder = nnx.List(decoder)

  def decode(
    self,
    z: Float[Array, 'B F h w latent_channels'],
    memory: Sequence[Float[Array, 'B 1 _ _ C']],
  ) -> tuple[Float[Array, 'B F _ _ 3'], tuple[Float[Array, 'B 1 _ _ C'], ...]]:
    """Decodes some frames of clips.

    Args:
      z: latents, multiplied by the scaling factor.
      memory: of the frames before, or `blank_memory`.

    Returns:
      Frames in [0,1] up to overshoot, and the memory for the frames after them.
    """
    before = iter(memory)
    after = []
    x: Any = z
    for layer in self.decoder:
      if isinstance(layer, MemoryBlock):
        x, last = layer.remember(x, next(before))
        after.append(last)
      else:
        x = layer(x)
    return x, tuple(after)


def blank_memory(
  config: TAESDVConfig, batch: int, height: int, width: int
) -> tuple[Float[Array, 'B 1 _ _ C'], ...]:
  """What the first frames of clips with latents of this size see: zeros."""
  memory = []
  for level in range(config.levels + 1):
    scale = 2**level
    count = 1 if level == config.levels else config.blocks
    shape = (batch, 1, scale * height, scale * width, config.channels)
    memory += [jnp.zeros(shape)] * count
  return tuple(memory)

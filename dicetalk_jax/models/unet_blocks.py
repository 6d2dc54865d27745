"""The three kinds of UNet stage: down, middle, up. Everything is `[B,F,H,W,C]`."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from dicetalk_jax.models.parameters import strip_prefix
from dicetalk_jax.models.resnet import Downsample, Upsample


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a stage needs beside the features."""

  temb: jax.Array  # [B,temb_channels]
  kv: dict[str, Any]  # attn2 name within the stage -> keys and values of its contexts
  mask: jax.Array | None  # [B,tokens] on the grid of the stage
  run: Callable[
    ..., jax.Array
  ]  # applies a block to its arguments, with or without rematerialisation

  def resnet(self, block: nnx.Module, x: jax.Array) -> jax.Array:
    return self.run(block, x, self.temb)

  def transformer(self, blocks: nnx.List, i: int, x: jax.Array) -> jax.Array:
    """Applies transformer i of a stage; plain stages have none."""
    return (
      self.run(blocks[i], x, strip_prefix(f'attentions.{i}', self.kv), self.mask)
      if blocks
      else x
    )


class DownBlock(nnx.Module):
  """Pairs of resnet and transformer, then half the resolution unless it is the last
  stage.
  """

  def __init__(
    self,
    cin: int,
    cout: int,
    *,
    layers: int,
    resnet,
    transformer,
    downsample: bool,
    dtype=None,
    rngs,
  ):
    """`resnet(cin, cout)` and `transformer(channels)` make the blocks; transformer
    None: a plain stage.
    """
    self.resnets = nnx.List(
      resnet(cin if i == 0 else cout, cout) for i in range(layers)
    )
    self.attentions = nnx.List(
      transformer(cout) for _ in range(layers if transformer else 0)
    )
    self.downsamplers = nnx.List(
      [Downsample(cout, dtype=dtype, rngs=rngs)] if downsample else []
    )

  def __call__(self, x: jax.Array, inputs: Inputs) -> list[jax.Array]:
    """Returns every tensor for the skip connections; the last one is the result."""
    skips = []
    for i, resnet in enumerate(self.resnets):
      x = inputs.transformer(self.attentions, i, inputs.resnet(resnet, x))
      skips.append(x)
    for downsample in self.downsamplers:
      skips.append(downsample(x))
    return skips


class MidBlock(nnx.Module):
  """Resnet, transformer, resnet."""

  def __init__(self, channels: int, *, resnet, transformer):
    self.resnets = nnx.List(resnet(channels, channels) for _ in range(2))
    self.attentions = nnx.List([transformer(channels)])

  def __call__(self, x: jax.Array, inputs: Inputs) -> jax.Array:
    first, last = self.resnets
    return inputs.resnet(
      last, inputs.transformer(self.attentions, 0, inputs.resnet(first, x))
    )


class UpBlock(nnx.Module):
  """Like `DownBlock`, joined by one skip tensor per pair, then twice the resolution
  unless it is the last stage.
  """

  def __init__(
    self,
    cin: int,
    cout: int,
    skips: list[int],
    *,
    resnet,
    transformer,
    upsample: bool,
    dtype=None,
    rngs,
  ):
    """`skips`: the channels of the skip tensors in order of use, one per pair."""
    widths = [cin] + [cout] * (len(skips) - 1)
    self.resnets = nnx.List(
      resnet(width + skip, cout) for width, skip in zip(widths, skips)
    )
    self.attentions = nnx.List(
      transformer(cout) for _ in (skips if transformer else [])
    )
    self.upsamplers = nnx.List(
      [Upsample(cout, dtype=dtype, rngs=rngs)] if upsample else []
    )

  def __call__(self, x: jax.Array, skips: list[jax.Array], inputs: Inputs) -> jax.Array:
    """`skips` in order of use."""
    for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
      x = inputs.resnet(resnet, jnp.concatenate([x, skip], axis=-1))
      x = inputs.transformer(self.attentions, i, x)
    for upsample in self.upsamplers:
      x = upsample(x)
    return x

"""The three kinds of UNet stage: down, middle, up. All features are `[B,F,H,W,C]`."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models.attention import KeyValue
from dicetalk_jax.models.parameters import strip_prefix
from dicetalk_jax.models.resnet import Downsample, SpatioTemporalResBlock, Upsample
from dicetalk_jax.models.transformer import SpatioTemporalTransformer

# `resnet(cin, cout)` makes a residual block.
MakeResnet = Callable[[int, int], SpatioTemporalResBlock]
# `transformer(channels)` makes a transformer; None for a stage without.
MakeTransformer = Callable[[int], SpatioTemporalTransformer]


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The inputs of a stage besides the features.

  Attributes:
    temb: the time embedding.
    kv: name of each attn2 within the stage -> keys and values of its contexts.
    mask: on the grid of the stage.
    run: applies a block to its arguments, with or without rematerialisation.
  """

  temb: Float[Array, 'B temb_channels']
  kv: Mapping[str, Sequence[KeyValue | None]]
  mask: Float[Array, '#B tokens'] | None
  run: Callable[..., Array]

  def resnet(self, block: nnx.Module, x: Array) -> Array:
    """Applies a residual block."""
    return self.run(block, x, self.temb)

  def transformer(self, blocks: nnx.List[Any], i: int, x: Array) -> Array:
    """Applies transformer i of a stage; plain stages have none."""
    if not blocks:
      return x
    return self.run(blocks[i], x, strip_prefix(f'attentions.{i}', self.kv), self.mask)


class DownBlock(nnx.Module):
  """Pairs of resnet and transformer, then half the resolution except in the last
  stage.
  """

  def __init__(
    self,
    cin: int,
    cout: int,
    *,
    layers: int,
    resnet: MakeResnet,
    transformer: MakeTransformer | None,
    downsample: bool,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    self.resnets = nnx.List(
      [resnet(cin if i == 0 else cout, cout) for i in range(layers)]
    )
    self.attentions: nnx.List[SpatioTemporalTransformer] = nnx.List([])
    if transformer is not None:
      self.attentions.extend([transformer(cout) for _ in range(layers)])
    self.downsamplers: nnx.List[Downsample] = nnx.List([])
    if downsample:
      self.downsamplers.append(Downsample(cout, dtype=dtype, rngs=rngs))

  def __call__(
    self, x: Float[Array, 'B F H W cin'], inputs: Inputs
  ) -> list[Float[Array, 'B F _ _ cout']]:
    """Returns every tensor for the skip connections; the last one is the result."""
    skips = []
    for i, resnet in enumerate(self.resnets):
      x = inputs.resnet(resnet, x)
      x = inputs.transformer(self.attentions, i, x)
      skips.append(x)
    for downsample in self.downsamplers:
      skips.append(downsample(x))
    return skips


class MidBlock(nnx.Module):
  """Resnet, transformer, resnet."""

  def __init__(
    self, channels: int, *, resnet: MakeResnet, transformer: MakeTransformer
  ):
    self.resnets = nnx.List([resnet(channels, channels) for _ in range(2)])
    self.attentions = nnx.List([transformer(channels)])

  def __call__(
    self, x: Float[Array, 'B F H W C'], inputs: Inputs
  ) -> Float[Array, 'B F H W C']:
    first, last = self.resnets
    x = inputs.resnet(first, x)
    x = inputs.transformer(self.attentions, 0, x)
    return inputs.resnet(last, x)


class UpBlock(nnx.Module):
  """Like `DownBlock`, joined by one skip tensor per pair, then twice the resolution
  except in the last stage.
  """

  def __init__(
    self,
    cin: int,
    cout: int,
    skips: list[int],
    *,
    resnet: MakeResnet,
    transformer: MakeTransformer | None,
    upsample: bool,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    """`skips`: the channels of the skip tensors in order of use, one per pair."""
    widths = [cin] + [cout] * (len(skips) - 1)
    self.resnets = nnx.List(
      [resnet(width + skip, cout) for width, skip in zip(widths, skips)]
    )
    self.attentions: nnx.List[SpatioTemporalTransformer] = nnx.List([])
    if transformer is not None:
      self.attentions.extend([transformer(cout) for _ in skips])
    self.upsamplers: nnx.List[Upsample] = nnx.List([])
    if upsample:
      self.upsamplers.append(Upsample(cout, dtype=dtype, rngs=rngs))

  def __call__(
    self,
    x: Float[Array, 'B F H W cin'],
    skips: Sequence[Float[Array, 'B F H W _']],
    inputs: Inputs,
  ) -> Float[Array, 'B F _ _ cout']:
    """`skips` in order of use."""
    for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
      x = inputs.resnet(resnet, jnp.concatenate([x, skip], axis=-1))
      x = inputs.transformer(self.attentions, i, x)
    for upsample in self.upsamplers:
      x = upsample(x)
    return x

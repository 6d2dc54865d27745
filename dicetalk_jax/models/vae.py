"""The autoencoder of Stable Video Diffusion.

Its encoder treats each image by itself; its decoder mixes frames in time.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models.attention import attend
from dicetalk_jax.models.layers import GroupNorm
from dicetalk_jax.models.parameters import ModelConfig
from dicetalk_jax.models.resnet import (
  Conv3x3,
  Downsample,
  ResnetBlock,
  SpatioTemporalResBlock,
  TemporalConv,
  Upsample,
)


@dataclasses.dataclass(frozen=True)
class VAEConfig(ModelConfig):
  """Reads the published `config.json` of AutoencoderKLTemporalDecoder.

  The defaults are the values in that file.
  """

  in_channels: int = 3
  out_channels: int = 3
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  latent_channels: int = 4
  sample_size: int = 768
  scaling_factor: float = 0.18215
  force_upcast: bool = True  # a note to its users: run it in float32
  norm_num_groups: int = 32

  def to_json(self) -> dict[str, Any]:
    """Adds the published file's list of blocks, one entry per width."""
    blocks = ('DownEncoderBlock2D',) * len(self.block_out_channels)
    return super().to_json() | {'down_block_types': blocks}


class Attention(nnx.Module):
  """One head of full width over the pixels of a frame, with norm and residual."""

  def __init__(
    self, channels: int, groups: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    linear = functools.partial(nnx.Linear, channels, channels, dtype=dtype, rngs=rngs)
    self.group_norm = GroupNorm(
      channels, num_groups=groups, epsilon=1e-6, dtype=dtype, rngs=rngs
    )
    self.to_q = linear()
    self.to_k = linear()
    self.to_v = linear()
    self.to_out = nnx.List([linear()])

  def __call__(self, x: Float[Array, '*frames H W C']) -> Float[Array, '*frames H W C']:
    """Attends within each frame."""
    tokens = self.group_norm(x.reshape(-1, x.shape[-3] * x.shape[-2], x.shape[-1]))

    def as_head(y: Array) -> Array:
      return y[:, :, None]

    q = as_head(self.to_q(tokens))
    k = as_head(self.to_k(tokens))
    v = as_head(self.to_v(tokens))
    return x + self.to_out[0](attend(q, k, v)).reshape(x.shape)


class Stage(nnx.Module):
  """Residual blocks of one width, then a change of resolution except in the last
  stage.
  """

  def __init__(
    self,
    resnets: Sequence[nnx.Module],
    *,
    downsampler: Downsample | None = None,
    upsampler: Upsample | None = None,
  ):
    self.resnets = nnx.List(resnets)
    self.downsamplers = None if downsampler is None else nnx.List([downsampler])
    self.upsamplers = None if upsampler is None else nnx.List([upsampler])

  def __call__(
    self, x: Float[Array, '*frames H W cin']
  ) -> Float[Array, '*frames _ _ C']:
    for block in (*self.resnets, *(self.downsamplers or ()), *(self.upsamplers or ())):
      x = block(x)
    return x


class MidBlock(nnx.Module):
  """Residual block, attention, residual block, at the lowest resolution."""

  def __init__(self, resnets: Sequence[nnx.Module], attention: Attention):
    self.resnets = nnx.List(resnets)
    self.attentions = nnx.List([attention])

  def __call__(self, x: Float[Array, '*frames H W C']) -> Float[Array, '*frames H W C']:
    first, second = self.resnets
    x = first(x)
    x = self.attentions[0](x)
    out: Array = second(x)
    return out


class Encoder(nnx.Module):
  """Images to the moments of their latents, each image by itself."""

  def __init__(
    self, config: VAEConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    conv = functools.partial(Conv3x3, dtype=dtype, rngs=rngs)
    resnet = functools.partial(
      ResnetBlock, groups=config.norm_num_groups, epsilon=1e-6, dtype=dtype, rngs=rngs
    )
    # The published encoder pads its strided convolutions at the right and bottom only.
    downsample = functools.partial(
      Downsample, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs
    )
    widths = config.block_out_channels
    lowest = widths[-1]

    self.conv_in = conv(config.in_channels, widths[0])
    self.down_blocks: nnx.List[Stage] = nnx.List([])
    width = widths[0]
    for i, cout in enumerate(widths):
      resnets = []
      for _ in range(config.layers_per_block):
        resnets.append(resnet(width, cout))
        width = cout
      is_last = i == len(widths) - 1
      downsampler = None if is_last else downsample(cout)
      self.down_blocks.append(Stage(resnets, downsampler=downsampler))
    self.mid_block = MidBlock(
      [resnet(lowest, lowest) for _ in range(2)],
      Attention(lowest, config.norm_num_groups, dtype=dtype, rngs=rngs),
    )
    self.conv_norm_out = GroupNorm(
      lowest, num_groups=config.norm_num_groups, epsilon=1e-6, dtype=dtype, rngs=rngs
    )
    self.conv_out = conv(lowest, 2 * config.latent_channels)

  def __call__(
    self, x: Float[Array, 'B H W in_channels']
  ) -> Float[Array, 'B _ _ moments']:
    """Returns `[B,h,w,2*latent_channels]`."""
    x = self.conv_in(x)
    for block in self.down_blocks:
      x = block(x)
    x = self.mid_block(x)
    return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class TemporalDecoder(nnx.Module):
  """Latents to frames.

  Residual blocks and the last convolution also look at neighbouring frames.
  """

  def __init__(
    self, config: VAEConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    conv = functools.partial(Conv3x3, dtype=dtype, rngs=rngs)
    resnet = functools.partial(
      SpatioTemporalResBlock,
      groups=config.norm_num_groups,
      epsilon=1e-6,
      temporal_epsilon=1e-5,
      mix_factor=0.0,
      switched=True,
      dtype=dtype,
      rngs=rngs,
    )
    widths = config.block_out_channels[::-1]
    lowest, highest = widths[0], widths[-1]

    self.conv_in = conv(config.latent_channels, lowest)
    self.mid_block = MidBlock(
      [resnet(lowest, lowest) for _ in range(2)],
      Attention(lowest, config.norm_num_groups, dtype=dtype, rngs=rngs),
    )
    self.up_blocks: nnx.List[Stage] = nnx.List([])
    width = lowest
    for i, cout in enumerate(widths):
      resnets = []
      for _ in range(config.layers_per_block + 1):
        resnets.append(resnet(width, cout))
        width = cout
      is_last = i == len(widths) - 1
      upsampler = None if is_last else Upsample(cout, dtype=dtype, rngs=rngs)
      self.up_blocks.append(Stage(resnets, upsampler=upsampler))
    self.conv_norm_out = GroupNorm(
      highest, num_groups=config.norm_num_groups, epsilon=1e-6, dtype=dtype, rngs=rngs
    )
    self.conv_out = conv(highest, config.out_channels)

    def identity(
      key: Array, shape: Any, dtype: Any = None, out_sharding: Any = None
    ) -> Array:
      return jnp.eye(shape[-1]).reshape(shape)

    self.time_conv_out = TemporalConv(
      config.out_channels,
      config.out_channels,
      kernel_init=identity,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(
    self, z: Float[Array, 'B F h w latent_channels']
  ) -> Float[Array, 'B F _ _ out_channels']:
    """Returns `[B,F,H,W,out_channels]`."""
    x = self.mid_block(self.conv_in(z))
    for block in self.up_blocks:
      x = block(x)
    # Per-frame statistics, unlike those of the temporal residual blocks.
    y = self.conv_norm_out(x.reshape(-1, *x.shape[2:])).reshape(x.shape)
    return self.time_conv_out(self.conv_out(nnx.silu(y)))


class VAE(nnx.Module):
  """Images to latents, eight times smaller, and back (published `vae`)."""

  def __init__(
    self, config: VAEConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    moments = 2 * config.latent_channels
    self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
    self.decoder = TemporalDecoder(config, dtype=dtype, rngs=rngs)
    self.quant_conv = nnx.Conv(moments, moments, (1, 1), dtype=dtype, rngs=rngs)

  def encode(
    self, x: Float[Array, 'B H W in_channels']
  ) -> tuple[
    Float[Array, 'B h w latent_channels'], Float[Array, 'B h w latent_channels']
  ]:
    """Computes the Gaussian of the latents of each image.

    Args:
      x: in [-1,1]; height and width are multiples of 2^(stages-1), 8 as published.

    Returns:
      mean and log-variance, float32, not multiplied by `scaling_factor`.
    """
    moments = self.quant_conv(self.encoder(x)).astype(jnp.float32)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30, 20)

  def decode(
    self, z: Float[Array, 'B F h w latent_channels']
  ) -> Float[Array, 'B F _ _ out_channels']:
    """Decodes clips.

    Frames of one clip influence each other, so its length matters (the reference
    implementation decodes 10 at a time).

    Args:
      z: latents, already divided by `scaling_factor`.

    Returns:
      `[B,F,H,W,out_channels]`, in [-1,1] up to overshoot.
    """
    return self.decoder(z)

"""The autoencoder of Stable Video Diffusion: an image encoder and a decoder that
mixes frames in time.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

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
  """Reads the published `config.json` of AutoencoderKLTemporalDecoder, whose values
  are the defaults.
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
    """Adds what the published file says of the blocks, one entry per width."""
    return super().to_json() | {
      'down_block_types': ('DownEncoderBlock2D',) * len(self.block_out_channels)
    }


class Attention(nnx.Module):
  """One head of full width over the pixels of a frame, with norm and residual."""

  def __init__(self, channels: int, groups: int, *, dtype=None, rngs):
    linear = functools.partial(nnx.Linear, channels, channels, dtype=dtype, rngs=rngs)
    self.group_norm = GroupNorm(
      channels, num_groups=groups, epsilon=1e-6, dtype=dtype, rngs=rngs
    )
    self.to_q = linear()
    self.to_k = linear()
    self.to_v = linear()
    self.to_out = nnx.List([linear()])

  def __call__(self, x: jax.Array) -> jax.Array:
    """x `[...,H,W,C]`, leading axes are frames; returns the same shape."""
    tokens = self.group_norm(x.reshape(-1, x.shape[-3] * x.shape[-2], x.shape[-1]))

    def head(layer):
      return layer(tokens)[:, :, None]

    y = attend(head(self.to_q), head(self.to_k), head(self.to_v))
    return x + self.to_out[0](y).reshape(x.shape)


class Stage(nnx.Module):
  """Residual blocks of one width, then in all stages but the last a change of
  resolution.
  """

  def __init__(self, resnets, *, downsampler=None, upsampler=None):
    self.resnets = nnx.List(resnets)
    self.downsamplers = None if downsampler is None else nnx.List([downsampler])
    self.upsamplers = None if upsampler is None else nnx.List([upsampler])

  def __call__(self, x: jax.Array) -> jax.Array:
    for block in (*self.resnets, *(self.downsamplers or ()), *(self.upsamplers or ())):
      x = block(x)
    return x


class MidBlock(nnx.Module):
  """Residual block, attention, residual block, at the lowest resolution."""

  def __init__(self, resnets, attention):
    self.resnets = nnx.List(resnets)
    self.attentions = nnx.List([attention])

  def __call__(self, x: jax.Array) -> jax.Array:
    first, second = self.resnets
    for block in (first, self.attentions[0], second):
      x = block(x)
    return x


class Encoder(nnx.Module):
  """Images to the moments of their latents, each frame by itself."""

  def __init__(self, config: VAEConfig, *, dtype=None, rngs):
    conv = functools.partial(Conv3x3, dtype=dtype, rngs=rngs)
    resnet = functools.partial(
      ResnetBlock, groups=config.norm_num_groups, epsilon=1e-6, dtype=dtype, rngs=rngs
    )
    # The published encoder pads its strided convolutions at the right and bottom only.
    down = functools.partial(
      Downsample, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs
    )
    widths = config.block_out_channels
    self.conv_in = conv(config.in_channels, widths[0])
    self.down_blocks = nnx.List()
    for i, (cin, cout) in enumerate(zip((widths[0], *widths), widths)):
      self.down_blocks.append(
        Stage(
          [resnet(cout if j else cin, cout) for j in range(config.layers_per_block)],
          downsampler=down(cout) if i < len(widths) - 1 else None,
        )
      )
    self.mid_block = MidBlock(
      [resnet(widths[-1], widths[-1]) for _ in range(2)],
      Attention(widths[-1], config.norm_num_groups, dtype=dtype, rngs=rngs),
    )
    self.conv_norm_out = GroupNorm(
      widths[-1],
      num_groups=config.norm_num_groups,
      epsilon=1e-6,
      dtype=dtype,
      rngs=rngs,
    )
    self.conv_out = conv(widths[-1], 2 * config.latent_channels)

  def __call__(self, x: jax.Array) -> jax.Array:
    """x `[B,H,W,in_channels]`; returns `[B,h,w,2*latent_channels]`."""
    x = self.conv_in(x)
    for block in (*self.down_blocks, self.mid_block):
      x = block(x)
    return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class TemporalDecoder(nnx.Module):
  """Latents to frames; residual blocks and the last convolution also look at
  neighbouring frames.
  """

  def __init__(self, config: VAEConfig, *, dtype=None, rngs):
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
    self.conv_in = conv(config.latent_channels, widths[0])
    self.mid_block = MidBlock(
      [resnet(widths[0], widths[0]) for _ in range(2)],
      Attention(widths[0], config.norm_num_groups, dtype=dtype, rngs=rngs),
    )
    self.up_blocks = nnx.List()
    for i, (cin, cout) in enumerate(zip((widths[0], *widths), widths)):
      self.up_blocks.append(
        Stage(
          [
            resnet(cout if j else cin, cout) for j in range(config.layers_per_block + 1)
          ],
          upsampler=Upsample(cout, dtype=dtype, rngs=rngs)
          if i < len(widths) - 1
          else None,
        )
      )
    self.conv_norm_out = GroupNorm(
      widths[-1],
      num_groups=config.norm_num_groups,
      epsilon=1e-6,
      dtype=dtype,
      rngs=rngs,
    )
    self.conv_out = conv(widths[-1], config.out_channels)

    def unchanged(key, shape):
      return jnp.eye(shape[-1]).reshape(shape)

    self.time_conv_out = TemporalConv(
      config.out_channels,
      config.out_channels,
      kernel_init=unchanged,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, z: jax.Array) -> jax.Array:
    """z `[B,F,h,w,latent_channels]`; returns `[B,F,H,W,out_channels]`."""
    x = self.conv_in(z)
    for block in (self.mid_block, *self.up_blocks):
      x = block(x)
    # Per-frame statistics, unlike those of the temporal residual blocks.
    y = self.conv_norm_out(x.reshape(-1, *x.shape[2:])).reshape(x.shape)
    return self.time_conv_out(self.conv_out(nnx.silu(y)))


class VAE(nnx.Module):
  """Pictures to latents eight times smaller and back (published `vae`)."""

  def __init__(self, config: VAEConfig, *, dtype=None, rngs):
    moments = 2 * config.latent_channels
    self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
    self.decoder = TemporalDecoder(config, dtype=dtype, rngs=rngs)
    self.quant_conv = nnx.Conv(moments, moments, (1, 1), dtype=dtype, rngs=rngs)

  def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Gaussian of the latents of each image.

    Args:
      x: `[B,H,W,in_channels]` in [-1,1]; height and width multiples of 2^(stages-1), 8
        as published.

    Returns:
      mean and log-variance, float32, both `[B,h,w,latent_channels]`; not multiplied by
      `scaling_factor`.
    """
    moments = self.quant_conv(self.encoder(x)).astype(jnp.float32)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30, 20)

  def decode(self, z: jax.Array) -> jax.Array:
    """Decodes clips; frames of one clip influence each other, so its length matters
    (published chunks: 10).

    Args:
      z: `[B,F,h,w,latent_channels]`, already divided by `scaling_factor`.

    Returns:
      `[B,F,H,W,out_channels]`, in [-1,1] up to overshoot.
    """
    return self.decoder(z)

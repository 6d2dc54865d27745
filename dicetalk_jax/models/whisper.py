"""Whisper's encoder, with all its hidden states.

Source: Radford et al. 2022, arXiv:2212.04356.
"""

import dataclasses
import functools
import math

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models.encoder_attention import EncoderAttention
from dicetalk_jax.models.layers import LayerNorm, gelu
from dicetalk_jax.models.parameters import ModelConfig


@dataclasses.dataclass(frozen=True)
class WhisperConfig(ModelConfig):
  """Reads the `config.json` of openai/whisper-tiny, whose values are the defaults."""

  d_model: int = 384
  encoder_layers: int = 4
  encoder_attention_heads: int = 6
  encoder_ffn_dim: int = 1536
  num_mel_bins: int = 80
  max_source_positions: int = 1500


def position_table(positions: int, width: int) -> Float[Array, '{positions} {width}']:
  """Whisper's fixed sinusoids, sines first, float32.

  Wavelengths run from 2 pi to 10000 * 2 pi.
  """
  half = width // 2
  step = -math.log(10000) / (half - 1)
  frequency = jnp.exp(step * jnp.arange(half, dtype=jnp.float32))
  angle = jnp.arange(positions, dtype=jnp.float32)[:, None] * frequency
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)


class EncoderLayer(nnx.Module):
  """Pre-norm transformer layer."""

  def __init__(
    self, config: WhisperConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    width = config.d_model
    self.self_attn = EncoderAttention(
      width, config.encoder_attention_heads, key_bias=False, dtype=dtype, rngs=rngs
    )
    self.self_attn_layer_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
    self.fc1 = nnx.Linear(width, config.encoder_ffn_dim, dtype=dtype, rngs=rngs)
    self.fc2 = nnx.Linear(config.encoder_ffn_dim, width, dtype=dtype, rngs=rngs)
    self.final_layer_norm = LayerNorm(width, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'B T d']) -> Float[Array, 'B T d']:
    x = x + self.self_attn(self.self_attn_layer_norm(x))
    return x + self.fc2(gelu(self.fc1(self.final_layer_norm(x))))


class Encoder(nnx.Module):
  """Two convolutions, positions, and the layers."""

  def __init__(
    self, config: WhisperConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    width = config.d_model
    positions = config.max_source_positions
    conv = functools.partial(
      nnx.Conv, kernel_size=(3,), padding=1, dtype=dtype, rngs=rngs
    )
    self.conv1 = conv(config.num_mel_bins, width)
    self.conv2 = conv(width, width, strides=2)
    self.embed_positions = nnx.Embed(
      positions,
      width,
      embedding_init=lambda *_: position_table(positions, width),
      dtype=dtype,
      rngs=rngs,
    )
    self.layers = nnx.List(
      [
        EncoderLayer(config, dtype=dtype, rngs=rngs)
        for _ in range(config.encoder_layers)
      ]
    )
    self.layer_norm = LayerNorm(width, dtype=dtype, rngs=rngs)

  def __call__(
    self, log_mel: Float[Array, 'B frames bins']
  ) -> Float[Array, 'B _ states d']:
    """Returns all states; see `WhisperEncoder`."""
    x = gelu(self.conv1(log_mel))
    x = gelu(self.conv2(x))
    x += self.embed_positions(jnp.arange(x.shape[1]))
    states = [x]
    for layer in self.layers:
      states.append(layer(states[-1]))
    states[-1] = self.layer_norm(states[-1])
    return jnp.stack(states, axis=2)


class WhisperEncoder(nnx.Module):
  """Speech to features, 50 per second (the `encoder` of the published Whisper)."""

  def __init__(
    self, config: WhisperConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    self.encoder = Encoder(config, dtype=dtype, rngs=rngs)

  def __call__(
    self, log_mel: Float[Array, 'B frames num_mel_bins']
  ) -> Float[Array, 'B _ states d_model']:
    """Encodes log-mel windows.

    Args:
      log_mel: 100 frames per second, at most twice `max_source_positions`.

    Returns:
      `[B,frames/2,encoder_layers+1,d_model]`: the embedding, then the output of each
      layer; the last one after the final norm.
    """
    return self.encoder(log_mel)

"""Projects a window of speech features to the audio tokens of one video frame."""

import dataclasses
import functools

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models.layers import LayerNorm
from dicetalk_jax.models.parameters import ModelConfig


@dataclasses.dataclass(frozen=True)
class AudioProjectionConfig(ModelConfig):
  """Sizes of the projection; the defaults are those of the published `audio_linear`."""

  seq_len: int = 10  # Whisper positions around a video frame, at 50 Hz
  blocks: int = 5  # hidden states per position
  channels: int = 384
  intermediate_dim: int = 1024
  output_dim: int = 1024
  context_tokens: int = 32


class AudioProjection(nnx.Module):
  """Three linear layers and a norm (published `audio_linear`).

  With other sizes it serves twice in the emotion model.
  """

  def __init__(
    self,
    config: AudioProjectionConfig,
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    self.config = config
    self.proj1 = linear(
      config.seq_len * config.blocks * config.channels, config.intermediate_dim
    )
    self.proj2 = linear(config.intermediate_dim, config.intermediate_dim)
    self.proj3 = linear(
      config.intermediate_dim, config.context_tokens * config.output_dim
    )
    self.norm = LayerNorm(config.output_dim, dtype=dtype, rngs=rngs)

  def __call__(
    self, x: Float[Array, 'B F *features']
  ) -> Float[Array, 'B F context_tokens output_dim']:
    """Projects the features of each frame to tokens.

    Args:
      x: `[B,F,seq_len,blocks,channels]`, or with the last axes already flattened in
        this order.

    Returns:
      Tokens; features of zero give the unconditional tokens.
    """
    batch, frames = x.shape[:2]
    x = x.reshape(batch, frames, -1)
    x = nnx.relu(self.proj1(x))
    x = nnx.relu(self.proj2(x))
    x = self.proj3(x)
    x = x.reshape(batch, frames, self.config.context_tokens, self.config.output_dim)
    tokens: Array = self.norm(x)
    return tokens

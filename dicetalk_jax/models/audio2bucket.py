"""Predicts the amount of motion of a video frame from speech and portrait (Sonic)."""

import dataclasses
import functools

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models.parameters import ModelConfig


@dataclasses.dataclass(frozen=True)
class AudioToBucketConfig(ModelConfig):
  """Sizes of the predictor; the defaults are those of the published `audio2bucket`."""

  seq_len: int = 50  # Whisper positions around a video frame, at 50 Hz
  channels: int = 384  # of Whisper's last state, the only one it sees
  clip_dim: int = 1024
  intermediate_dim: int = 1024
  output_dim: int = 2


class AudioToBucket(nnx.Module):
  """Three linear layers (Sonic's published `audio2bucket`)."""

  def __init__(
    self, config: AudioToBucketConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    self.proj1 = linear(
      config.seq_len * config.channels + config.clip_dim, config.intermediate_dim
    )
    self.proj2 = linear(config.intermediate_dim, config.intermediate_dim)
    self.proj3 = linear(config.intermediate_dim, config.output_dim)

  def __call__(
    self, x: Float[Array, 'B F *features'], image: Float[Array, 'B clip_dim']
  ) -> Float[Array, 'B F output_dim']:
    """Predicts motion.

    Args:
      x: `[B,F,seq_len,channels]`, or with the last axes already flattened in this
        order.
      image: the portrait's CLIP embedding.

    Returns:
      Raw motion: the motion ids that the UNet is given are `16 y + 16`.
    """
    x = x.reshape(*x.shape[:2], -1)
    image = jnp.broadcast_to(image[:, None], (*x.shape[:2], image.shape[-1]))
    x = nnx.silu(self.proj1(jnp.concatenate([x, image], axis=-1)))
    return self.proj3(nnx.silu(self.proj2(x)))

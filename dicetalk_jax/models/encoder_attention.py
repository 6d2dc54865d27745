"""Self-attention with the names that Whisper and CLIP share."""

import functools

from flax import nnx
import jax

from dicetalk_jax.models.attention import attend


class EncoderAttention(nnx.Module):
  """Multi-head self-attention (published name `self_attn`); Whisper's keys have no
  bias.
  """

  def __init__(
    self, channels: int, heads: int, *, key_bias: bool = True, dtype=None, rngs
  ):
    linear = functools.partial(nnx.Linear, channels, channels, dtype=dtype, rngs=rngs)
    self.q_proj = linear()
    self.k_proj = linear(use_bias=key_bias)
    self.v_proj = linear()
    self.out_proj = linear()
    self.heads = heads

  def __call__(self, x: jax.Array) -> jax.Array:
    """x `[B,T,C]`; returns the same shape, without the residual."""

    def split(y):
      return y.reshape(*y.shape[:2], self.heads, -1)

    y = attend(split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x)))
    return self.out_proj(y.reshape(x.shape))

"""Self-attention with the names that Whisper and CLIP share."""

import functools

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models.attention import attend


class EncoderAttention(nnx.Module):
  """Multi-head self-attention (published name `self_attn`).

  Whisper's keys have no bias.
  """

  def __init__(
    self,
    channels: int,
    heads: int,
    *,
    key_bias: bool = True,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    linear = functools.partial(nnx.Linear, channels, channels, dtype=dtype, rngs=rngs)
    self.q_proj = linear()
    self.k_proj = linear(use_bias=key_bias)
    self.v_proj = linear()
    self.out_proj = linear()
    self.heads = heads

  def __call__(self, x: Float[Array, 'B T C']) -> Float[Array, 'B T C']:
    """Attends along T; the residual is left to the caller."""

    def split_heads(y: Array) -> Array:
      return y.reshape(*y.shape[:2], self.heads, -1)

    q = split_heads(self.q_proj(x))
    k = split_heads(self.k_proj(x))
    v = split_heads(self.v_proj(x))
    return self.out_proj(attend(q, k, v).reshape(x.shape))

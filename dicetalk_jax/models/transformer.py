"""The spatio-temporal transformer of the UNet: tokens look within their frame, then
along time.
"""

from collections.abc import Mapping
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from dicetalk_jax.models.attention import CrossAttention, KeyValue, SelfAttention
from dicetalk_jax.models.layers import GroupNorm, LayerNorm, gelu, sinusoid
from dicetalk_jax.models.resnet import Blend


class EmbeddingMLP(nnx.Module):
  """Two linear layers that turn a sinusoidal embedding into features."""

  def __init__(self, cin: int, hidden: int, cout: int, *, dtype=None, rngs):
    self.linear_1 = nnx.Linear(cin, hidden, dtype=dtype, rngs=rngs)
    self.linear_2 = nnx.Linear(hidden, cout, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.linear_2(nnx.silu(self.linear_1(x)))


class GEGLU(nnx.Module):
  """a * GELU(g), both linear in the input."""

  def __init__(self, cin: int, cout: int, *, dtype=None, rngs):
    self.proj = nnx.Linear(cin, 2 * cout, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    a, g = jnp.split(self.proj(x), 2, axis=-1)
    return a * gelu(g)


class FeedForward(nnx.Module):
  """Gated feed-forward of four times the width."""

  def __init__(self, channels: int, *, dtype=None, rngs):
    # The published list has a dropout of rate 0 in the middle.
    self.net = nnx.List(
      [
        GEGLU(channels, 4 * channels, dtype=dtype, rngs=rngs),
        nnx.Dropout(0.0),
        nnx.Linear(4 * channels, channels, dtype=dtype, rngs=rngs),
      ]
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.net[2](self.net[0](x))


class SpatialBlock(nnx.Module):
  """Attention among the tokens of a frame, attention to its contexts, feed-forward
  (`transformer_blocks`).
  """

  def __init__(
    self,
    channels: int,
    heads: int,
    context_dim: int,
    adapters: int,
    *,
    dtype=None,
    rngs,
  ):
    norm = functools.partial(LayerNorm, channels, dtype=dtype, rngs=rngs)
    self.norm1 = norm()
    self.attn1 = SelfAttention(channels, heads, dtype=dtype, rngs=rngs)
    self.norm2 = norm()
    self.attn2 = CrossAttention(
      channels, heads, context_dim, adapters, dtype=dtype, rngs=rngs
    )
    self.norm3 = norm()
    self.ff = FeedForward(channels, dtype=dtype, rngs=rngs)

  def __call__(
    self, x: jax.Array, kv: tuple[KeyValue | None, ...], mask: jax.Array | None
  ) -> jax.Array:
    """x `[B,F,T,C]`, kv `[B,F',S,C]` each, mask `[B,T]` or None; returns
    `[B,F,T,C]`.
    """
    x += self.attn1(self.norm1(x))
    x += self.attn2(self.norm2(x), kv, mask)
    return x + self.ff(self.norm3(x))


class TemporalBlock(nnx.Module):
  """Attention along the frames of each pixel, attention to the mean contexts
  (`temporal_transformer_blocks`).

  Tokens stay `[B,F,T,C]`; only the self-attention regroups them. The face mask has no
  part here.
  """

  def __init__(
    self,
    channels: int,
    heads: int,
    context_dim: int,
    adapters: int,
    *,
    dtype=None,
    rngs,
  ):
    norm = functools.partial(LayerNorm, channels, dtype=dtype, rngs=rngs)
    self.norm_in = norm()
    self.ff_in = FeedForward(channels, dtype=dtype, rngs=rngs)
    self.norm1 = norm()
    self.attn1 = SelfAttention(channels, heads, dtype=dtype, rngs=rngs)
    self.norm2 = norm()
    self.attn2 = CrossAttention(
      channels, heads, context_dim, adapters, dtype=dtype, rngs=rngs
    )
    self.norm3 = norm()
    self.ff = FeedForward(channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array, kv: tuple[KeyValue | None, ...]) -> jax.Array:
    """x `[B,F,T,C]`, kv `[B,F',S,C]` each; returns `[B,F,T,C]`."""
    x += self.ff_in(self.norm_in(x))
    x += self.attn1(self.norm1(x).swapaxes(1, 2)).swapaxes(1, 2)
    # Projections are linear: the mean of keys and values is that of the projected mean
    # token.
    x += self.attn2(self.norm2(x), jax.tree.map(lambda y: y.mean(1, keepdims=True), kv))
    return x + self.ff(self.norm3(x))


class SpatioTemporalTransformer(nnx.Module):
  """Pairs of spatial and temporal blocks, blended, around a residual path (published
  name `attentions.i`).
  """

  def __init__(
    self,
    channels: int,
    *,
    heads: int,
    context_dim: int,
    adapters: int,
    layers: int = 1,
    groups: int = 32,
    dtype=None,
    rngs,
  ):
    block = dict(
      channels=channels,
      heads=heads,
      context_dim=context_dim,
      adapters=adapters,
      dtype=dtype,
      rngs=rngs,
    )
    self.norm = GroupNorm(channels, groups, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.proj_in = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)
    self.transformer_blocks = nnx.List(SpatialBlock(**block) for _ in range(layers))
    self.temporal_transformer_blocks = nnx.List(
      TemporalBlock(**block) for _ in range(layers)
    )
    self.time_pos_embed = EmbeddingMLP(
      channels, 4 * channels, channels, dtype=dtype, rngs=rngs
    )
    self.time_mixer = Blend()
    self.proj_out = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    kv: Mapping[str, tuple[KeyValue | None, ...]],
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Computes the transformer.

    Args:
      x: `[B,F,H,W,C]`. Frame numbers count from 0 in every window.
      kv: for each attn2 by its name in here (`transformer_blocks.0.attn2`), keys and
        values of all contexts.
      mask: `[B,H*W]` weights of the adapters in the spatial blocks, or None.

    Returns:
      `[B,F,H,W,C]`.
    """
    b, f, h, w, c = x.shape
    y = self.proj_in(self.norm(x.reshape(b * f, h * w, c))).reshape(b, f, h * w, c)
    frame = self.time_pos_embed(sinusoid(jnp.arange(f), c))[:, None]
    for i, (spatial, temporal) in enumerate(
      zip(self.transformer_blocks, self.temporal_transformer_blocks)
    ):
      y = spatial(y, kv[f'transformer_blocks.{i}.attn2'], mask)
      y = self.time_mixer(
        y, temporal(y + frame, kv[f'temporal_transformer_blocks.{i}.attn2'])
      )
    return self.proj_out(y).reshape(x.shape) + x

"""The spatio-temporal transformer of the UNet: tokens look within their frame, then
along time.
"""

from collections.abc import Mapping, Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models import fused_geglu
from dicetalk_jax.models.attention import CrossAttention, KeyValue, SelfAttention
from dicetalk_jax.models.layers import GroupNorm, LayerNorm, gelu, sinusoid
from dicetalk_jax.models.resnet import Blend


class EmbeddingMLP(nnx.Module):
  """Two linear layers that turn a sinusoidal embedding into features."""

  def __init__(
    self,
    cin: int,
    hidden: int,
    cout: int,
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    self.linear_1 = nnx.Linear(cin, hidden, dtype=dtype, rngs=rngs)
    self.linear_2 = nnx.Linear(hidden, cout, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, '*rows cin']) -> Float[Array, '*rows cout']:
    return self.linear_2(nnx.silu(self.linear_1(x)))


class GEGLU(nnx.Module):
  """Gated linear unit: a * GELU(g), with a and g linear in the input."""

  def __init__(
    self, cin: int, cout: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    self.proj = nnx.Linear(cin, 2 * cout, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, '*rows cin']) -> Float[Array, '*rows cout']:
    linear = self.proj
    dtype = linear.dtype or x.dtype
    if not fused_geglu.fits(dtype, x.shape, linear.out_features // 2):
      a, g = jnp.split(linear(x), 2, axis=-1)
      return a * gelu(g)
    assert linear.bias is not None
    x, kernel, bias = linear.promote_dtype(
      (x, linear.kernel[...], linear.bias[...]), dtype=dtype
    )
    return fused_geglu.geglu(x, kernel, bias)


class FeedForward(nnx.Module):
  """Gated feed-forward of four times the width."""

  def __init__(self, channels: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
    # The published list has a dropout of rate 0 in the middle.
    self.net = nnx.List(
      [
        GEGLU(channels, 4 * channels, dtype=dtype, rngs=rngs),
        nnx.Dropout(0.0),
        nnx.Linear(4 * channels, channels, dtype=dtype, rngs=rngs),
      ]
    )

  def __call__(self, x: Float[Array, '*rows C']) -> Float[Array, '*rows C']:
    gate, _, linear = self.net
    out: Array = linear(gate(x))
    return out


class SpatialBlock(nnx.Module):
  """Attention among the tokens of a frame, attention to its contexts, feed-forward.

  Published name `transformer_blocks.i`.
  """

  def __init__(
    self,
    channels: int,
    heads: int,
    context_dim: int,
    adapters: int,
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
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
    self,
    x: Float[Array, 'B F T C'],
    kv: Sequence[KeyValue | None],
    mask: Float[Array, '#B T'] | None,
  ) -> Float[Array, 'B F T C']:
    """See `CrossAttention` for `kv` and `mask`."""
    x += self.attn1(self.norm1(x))
    x += self.attn2(self.norm2(x), kv, mask)
    return x + self.ff(self.norm3(x))


class TemporalBlock(nnx.Module):
  """Attention along the frames of each pixel, attention to the mean contexts.

  Published name `temporal_transformer_blocks.i`. Tokens stay `[B,F,T,C]`; only the
  self-attention regroups them. The face mask is not used here.
  """

  def __init__(
    self,
    channels: int,
    heads: int,
    context_dim: int,
    adapters: int,
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
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

  def __call__(
    self, x: Float[Array, 'B F T C'], kv: Sequence[KeyValue | None]
  ) -> Float[Array, 'B F T C']:
    """See `CrossAttention` for `kv`."""
    x += self.ff_in(self.norm_in(x))
    x += self.attn1(self.norm1(x).swapaxes(1, 2)).swapaxes(1, 2)
    x += self.attn2(self.norm2(x), _mean_over_frames(kv))
    return x + self.ff(self.norm3(x))


def _mean_over_frames(kv: Sequence[KeyValue | None]) -> Sequence[KeyValue | None]:
  """Keys and values of the mean token of each context.

  Projections are linear: the mean of keys and values is that of the projected mean
  token.
  """
  means: Sequence[KeyValue | None]
  means = jax.tree.map(lambda y: y.mean(1, keepdims=True), kv)
  return means


class SpatioTemporalTransformer(nnx.Module):
  """Pairs of spatial and temporal blocks, blended, around a residual path.

  Published name `attentions.i`.
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
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    sizes = (channels, heads, context_dim, adapters)
    self.norm = GroupNorm(channels, groups, epsilon=1e-6, dtype=dtype, rngs=rngs)
    self.proj_in = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)
    self.transformer_blocks = nnx.List(
      SpatialBlock(*sizes, dtype=dtype, rngs=rngs) for _ in range(layers)
    )
    self.temporal_transformer_blocks = nnx.List(
      TemporalBlock(*sizes, dtype=dtype, rngs=rngs) for _ in range(layers)
    )
    self.time_pos_embed = EmbeddingMLP(
      channels, 4 * channels, channels, dtype=dtype, rngs=rngs
    )
    self.time_mixer = Blend()
    self.proj_out = nnx.Linear(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, 'B F H W C'],
    kv: Mapping[str, Sequence[KeyValue | None]],
    mask: Float[Array, '#B H*W'] | None = None,
  ) -> Float[Array, 'B F H W C']:
    """Computes the transformer.

    Args:
      x: features; frame numbers count from 0 in every window.
      kv: for each attn2 by its name in here (`transformer_blocks.0.attn2`), keys and
        values of all contexts.
      mask: weights of the adapters in the spatial blocks, or None.
    """
    # 1. Pixels become tokens, and frame numbers become features.
    b, f, h, w, c = x.shape
    y = self.proj_in(self.norm(x.reshape(b * f, h * w, c))).reshape(b, f, h * w, c)
    frame = self.time_pos_embed(sinusoid(jnp.arange(f), c))[:, None]

    # 2. Look within each frame, then along time, and blend the two.
    blocks = zip(self.transformer_blocks, self.temporal_transformer_blocks)
    for i, (spatial, temporal) in enumerate(blocks):
      y = spatial(y, kv[f'transformer_blocks.{i}.attn2'], mask)
      in_time = temporal(y + frame, kv[f'temporal_transformer_blocks.{i}.attn2'])
      y = self.time_mixer(y, in_time)

    # 3. Tokens become pixels again.
    return self.proj_out(y).reshape(x.shape) + x

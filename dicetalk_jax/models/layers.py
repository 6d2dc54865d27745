"""Flax layers with PyTorch's conventions, and the few functions that models share."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

# Flax's defaults differ from PyTorch's: two-pass variance and an explicit epsilon,
# everywhere.
LayerNorm = functools.partial(nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False)


def gelu(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """The exact GELU, as in PyTorch."""
  return jax.nn.gelu(x, approximate=False)


class PReLU(nnx.Module):
  """Rectifier with one learned slope per channel for negative values."""

  def __init__(self, channels: int):
    self.negative_slope = nnx.Param(jnp.full(channels, 0.25, jnp.float32))

  def __call__(self, x: Float[Array, '*shape C']) -> Float[Array, '*shape C']:
    return jnp.where(x >= 0, x, self.negative_slope[...].astype(x.dtype) * x)


class GroupNorm(nnx.GroupNorm):
  """Group normalisation with statistics in float32.

  Statistics run over all axes between the first and the last. They are taken per
  channel first and then per group: a view with the channels of a group as its last
  axis, which the base class reduces over, is slow on every device.

  Half-precision inputs are read once for both statistics: the variance is the mean
  square less the squared mean, and what cancels in float32 is far below the rounding of
  the inputs. Other inputs are read twice, as in PyTorch.
  """

  def __call__(  # type: ignore[override]  # the base class also takes a mask
    self, x: Float[Array, 'B *shape C']
  ) -> Float[Array, 'B *shape C']:
    """Returns the layer's dtype."""
    assert self.scale is not None and self.bias is not None
    axes = tuple(range(1, x.ndim - 1))
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def group_mean(y: Array) -> Array:
      """The mean of each channel's group, to broadcast against x."""
      channels = y.mean(axes)
      groups = channels.reshape(len(x), self.num_groups, self.group_size).mean(-1)
      return jnp.expand_dims(jnp.repeat(groups, self.group_size, axis=1), axes)

    mean = group_mean(exact)
    if x.dtype in (jnp.bfloat16, jnp.float16):
      variance = jnp.maximum(group_mean(jnp.square(exact)) - jnp.square(mean), 0)
    else:
      variance = group_mean(jnp.square(exact - mean))
    scale = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
    return ((exact - mean) * scale + self.bias[...]).astype(self.dtype or x.dtype)


def sinusoid(x: Real[Array, '*shape'], width: int) -> Float[Array, '*shape {width}']:
  """Computes a sinusoidal embedding, cosine first.

  It is that of diffusers with `flip_sin_to_cos` and shift 0.

  Args:
    x: timesteps, ids or frame indices.
    width: even.

  Returns:
    float32.
  """
  half = width // 2
  frequency = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / half)
  angle = x.astype(jnp.float32)[..., None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)

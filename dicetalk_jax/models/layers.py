"""Flax layers with PyTorch's conventions, and the few functions that every model
shares.
"""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp

# Flax's defaults are not PyTorch's: two-pass variance and an explicit epsilon,
# everywhere.
LayerNorm = functools.partial(nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False)

gelu = functools.partial(jax.nn.gelu, approximate=False)


class GroupNorm(nnx.GroupNorm):
  """Group normalisation with two-pass statistics in float32 over all axes between the
  first and the last.

  Statistics are taken per channel first and then per group: a view with the channels of
  a group as its last axis, which the base class reduces over, is slow on every device.
  """

  def __call__(self, x: jax.Array) -> jax.Array:
    """x `[B,...,C]`; returns the same shape in the layer's dtype."""
    axes = tuple(range(1, x.ndim - 1))
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def per_group(y):
      mean = y.mean(axes).reshape(len(x), self.num_groups, self.group_size).mean(-1)
      return jnp.expand_dims(jnp.repeat(mean, self.group_size, axis=1), axes)

    centred = exact - per_group(exact)
    scale = (
      jax.lax.rsqrt(per_group(jnp.square(centred)) + self.epsilon) * self.scale[...]
    )
    return (centred * scale + self.bias[...]).astype(self.dtype or x.dtype)


def sinusoid(x: jax.Array, width: int) -> jax.Array:
  """Sinusoidal embedding, cosine first, as in diffusers with `flip_sin_to_cos`, shift
  0.

  Args:
    x: any shape; real numbers (timesteps, ids or frame indices).
    width: even.

  Returns:
    float32, `[*x.shape, width]`.
  """
  half = width // 2
  frequency = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / half)
  angle = x.astype(jnp.float32)[..., None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)

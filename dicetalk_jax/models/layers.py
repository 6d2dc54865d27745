"""Flax layers with PyTorch's conventions, and the few functions that every model shares."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp

# Flax's defaults are not PyTorch's: two-pass variance and an explicit epsilon, everywhere.
GroupNorm = functools.partial(nnx.GroupNorm, use_fast_variance=False)
LayerNorm = functools.partial(nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False)

gelu = functools.partial(jax.nn.gelu, approximate=False)


def sinusoid(x: jax.Array, width: int) -> jax.Array:
  """Sinusoidal embedding, cosine first, as in diffusers with `flip_sin_to_cos`, shift 0.

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

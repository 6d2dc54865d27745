"""Layers with the conventions of PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dicetalk_jax.models import parameters
from dicetalk_jax.models.layers import GroupNorm


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def group_norm(dtype):
  graphdef, shapes = parameters.abstract(
    lambda rngs: GroupNorm(8, 4, epsilon=1e-5, dtype=dtype, rngs=rngs)
  )
  return graphdef, parameters.numpy_params(shapes)


def expected(params, x):
  y = torch.nn.functional.group_norm(
    torch.tensor(x).double().movedim(-1, 1),
    4,
    torch.tensor(np.asarray(params['scale'])).double(),
    torch.tensor(np.asarray(params['bias'])).double(),
    1e-5,
  )
  return y.movedim(1, -1)


# In half precision the mean may be far from zero, though no farther than the inputs
# can tell neighbours apart.
@pytest.mark.parametrize(
  ('dtype', 'mean', 'tolerance'),
  [
    (jnp.float32, 0.0, 1e-5),
    (jnp.float32, 300.0, 1e-3),
    (jnp.bfloat16, 0.0, 2e-2),
    (jnp.bfloat16, 30.0, 2e-2),
    (jnp.float16, 100.0, 4e-3),
  ],
)
def test_group_norm_agrees_with_torch(dtype, mean, tolerance):
  graphdef, params = group_norm(dtype)
  # What both see: rounded inputs.
  x = np.asarray(jnp.asarray(draw(0, 2, 5, 6, 8) + mean, dtype).astype(jnp.float32))
  ours = parameters.merge(graphdef, params)(jnp.asarray(x, dtype))
  assert ours.dtype == dtype
  difference = np.abs(np.asarray(ours, np.float32) - expected(params, x).numpy())
  assert difference.max() <= tolerance * np.abs(expected(params, x).numpy()).max()


def test_half_precision_is_read_once():
  """Both sums of the statistics are taken of the input: one kernel can do both."""

  def second_sum_needs_the_mean(dtype):
    graphdef, params = group_norm(dtype)
    x = jax.ShapeDtypeStruct((2, 5, 6, 8), dtype)
    traced = jax.jit(lambda x: parameters.merge(graphdef, params)(x)).trace(x)
    sums = [e for e in traced.jaxpr.eqns if e.primitive.name == 'reduce_sum']
    of_pixels = [e for e in sums if len(e.invars[0].aval.shape) == 4]
    between = {e.primitive.name for e in _from(traced.jaxpr, of_pixels[1].invars[0])}
    return 'sub' in between

  assert second_sum_needs_the_mean(jnp.float32)
  assert not second_sum_needs_the_mean(jnp.bfloat16)


def _from(jaxpr, variable):
  """The equations that a variable depends on."""
  made_by = {v: e for e in jaxpr.eqns for v in e.outvars}
  waiting, found = [variable], []
  while waiting:
    equation = made_by.get(waiting.pop())
    if equation is not None and equation not in found:
      found.append(equation)
      waiting += [v for v in equation.invars if isinstance(v, type(variable))]
  return found

"""Counts the arithmetic of a JAX function from its trace. Nothing is compiled or run.

Products, convolutions and fused attention count: a multiply-add is two operations, and
everything else is small. The count is the same on every device, unlike that of a
compiler, which does not see into the library calls of a GPU.
"""

from collections.abc import Callable, Iterator
import math
from typing import Any

import jax

FUSED_FORWARD = 'dot_product_attention_fwd'
FUSED_BACKWARD = 'dot_product_attention_bwd'


def tflop(function: Callable, *args: Any) -> float:
  """The arithmetic of `function(*args)` in 1e12 operations.

  Args:
    function: may be jitted; what it recomputes in a backward pass counts again.
    args: arrays or `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: there is a product in a loop of unknown length.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr) / 1e12


def _count(jaxpr: Any) -> int:
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> int:
  name = equation.primitive.name
  shapes = [getattr(x.aval, 'shape', ()) for x in equation.invars]
  out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0

  # Leaves
  if name == 'dot_general':
    (contracted, _), _ = equation.params['dimension_numbers']
    return 2 * out * math.prod(shapes[0][axis] for axis in contracted)
  if name == 'conv_general_dilated':
    features = shapes[1][equation.params['dimension_numbers'].rhs_spec[0]]
    return 2 * out * math.prod(shapes[1]) // features
  if name.startswith((FUSED_FORWARD, FUSED_BACKWARD)):
    # [batch, tokens, heads, d]: two products forward, five backward.
    product = 2 * math.prod(shapes[0]) * shapes[1][1]
    return (2 if name.startswith(FUSED_FORWARD) else 5) * product

  # Equations that hold others
  inner = [_count(part) for part in _parts(equation.params)]
  if name == 'scan':
    return equation.params['length'] * sum(inner)
  if name == 'cond':
    return max(inner)
  if name == 'while' and sum(inner):
    raise ValueError('products in a loop of unknown length cannot be counted')
  return sum(inner)


def _parts(params: dict[str, Any]) -> Iterator[Any]:
  """The programs inside an equation."""
  for value in params.values():
    for part in value if isinstance(value, (tuple, list)) else (value,):
      part = getattr(part, 'jaxpr', part)
      if hasattr(part, 'eqns'):
        yield part

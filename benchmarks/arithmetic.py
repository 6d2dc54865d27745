"""Counts the arithmetic of a JAX function from its trace. Nothing is compiled or run.

Products, convolutions and fused attention count: a multiply-add is two operations, and
everything else is small. The count is the same on every device, unlike that of a
compiler, which cannot see into the library calls of a GPU.
"""

from collections.abc import Callable, Iterator
import math
from typing import Any

import jax

FUSED_FORWARD = 'dot_product_attention_fwd'
FUSED_BACKWARD = 'dot_product_attention_bwd'


def tflop(function: Callable[..., Any], *args: Any) -> float:
  """The arithmetic of `function(*args)` in 1e12 operations.

  Args:
    function: may be jitted; what it recomputes in a backward pass counts again.
    args: arrays or `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: there is a product in a loop of unknown length.
  """
  if isinstance(function, jax.stages.Wrapped):
    # One with options for the compiler cannot be traced inside another function.
    return _count(function.trace(*args).jaxpr.jaxpr) / 1e12
  return _count(jax.make_jaxpr(function)(*args).jaxpr) / 1e12


def _count(program: Any) -> int:
  """The operations of a jaxpr."""
  return sum(_count_equation(equation) for equation in program.eqns)


def _count_equation(equation: Any) -> int:
  """The operations of one equation, with those of the programs inside it."""
  name = equation.primitive.name

  # 1. Arithmetic
  if name == 'dot_general':
    return _count_product(equation)
  if name == 'conv_general_dilated':
    return _count_convolution(equation)
  if name.startswith(FUSED_FORWARD):
    return 2 * _count_attention_product(equation)
  if name.startswith(FUSED_BACKWARD):
    return 5 * _count_attention_product(equation)

  # 2. Equations that hold programs
  counts = [_count(program) for program in _programs_in(equation.params)]
  if name == 'scan':
    return equation.params['length'] * sum(counts)
  if name == 'cond':
    return max(counts)
  if name == 'while' and sum(counts):
    raise ValueError('products in a loop of unknown length cannot be counted')
  return sum(counts)


def _count_product(equation: Any) -> int:
  (contracted, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  out = math.prod(equation.outvars[0].aval.shape)
  return 2 * out * math.prod(left[axis] for axis in contracted)


def _count_convolution(equation: Any) -> int:
  kernel = equation.invars[1].aval.shape
  features = kernel[equation.params['dimension_numbers'].rhs_spec[0]]
  out = math.prod(equation.outvars[0].aval.shape)
  # Of a dilated input, as in a transposed convolution, most elements are zero.
  dilation = math.prod(equation.params['lhs_dilation'])
  return 2 * out * math.prod(kernel) // features // dilation


def _count_attention_product(equation: Any) -> int:
  """One of the products inside fused attention, such as queries with keys."""
  # Both are [batch, tokens, heads, d].
  queries = equation.invars[0].aval.shape
  keys = equation.invars[1].aval.shape
  return 2 * math.prod(queries) * keys[1]


def _programs_in(params: dict[str, Any]) -> Iterator[Any]:
  """The jaxprs among the parameters of an equation, alone or in lists."""
  for value in params.values():
    candidates = value if isinstance(value, (tuple, list)) else [value]
    for candidate in candidates:
      program = getattr(candidate, 'jaxpr', candidate)  # a closed jaxpr holds one
      if hasattr(program, 'eqns'):
        yield program

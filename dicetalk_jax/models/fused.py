"""Kernels of our own for NVIDIA GPUs: one pass over memory where XLA makes several.

They are off unless `kernels` turns them on, because no GPU has timed them yet. They are
written in Pallas for its Triton backend, which covers Ampere and Hopper with one source
and compiles without a GPU; its other backend for NVIDIA, Mosaic GPU, begins with
Hopper. Results equal those of the plain layers within rounding.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from dicetalk_jax.models import target

# Part of the key of JAX's caches, as the target is.
_switch = jax.make_user_context(False)


@contextlib.contextmanager
def kernels(on: bool = True) -> Iterator[None]:
  """Layers that are traced in its block use these kernels where they can."""
  with _switch(on):
    yield


def can_run(dtype: DTypeLike, rows: int) -> bool:
  """Whether a layer may use its kernel.

  Args:
    dtype: of its computation. The kernels are for half precision.
    rows: length of the first axis, which is split over the devices of a mesh. Devices
      that share the rows of images ('sequence') keep the plain layers.
  """
  devices = target.current()
  axes = target.shared_axes()
  return (
    bool(_switch.value)
    and devices.platform == 'cuda'
    and devices.capability >= 8
    and dtype in (jnp.bfloat16, jnp.float16)
    and axes.get('sequence', 1) == 1
    and rows % math.prod(axes.values()) == 0
  )


def by_rows(kernel: Callable[[Any, Any], Array], rows: Any, whole: Any) -> Array:
  """Computes `kernel(rows, whole)`, with each device on its own rows.

  The compiler cannot divide a kernel among devices by itself.

  Args:
    kernel: returns an array with as many rows.
    rows: a tree of arrays with the same first axis.
    whole: a tree of arrays that every device needs.
  """
  axes = target.shared_axes()
  if math.prod(axes.values()) == 1:
    return kernel(rows, whole)
  split = jax.P(tuple(axes))
  on_each_device = jax.shard_map(
    kernel,
    in_specs=(split, jax.P()),
    out_specs=split,
    axis_names=set(axes),
    check_vma=False,  # Pallas does not say what its results depend on
  )
  out: Array = on_each_device(rows, whole)
  return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_plain_gradient(
  kernel: Callable[..., Array], plain: Callable[..., Array], *args: Any
) -> Array:
  """Computes `kernel(*args)`; the gradient is that of `plain(*args)`.

  The backward pass computes `plain` again: nothing but the arguments is kept. Neither
  function may close over an array.
  """
  return kernel(*args)


def _forward(
  kernel: Callable[..., Array], plain: Callable[..., Array], *args: Any
) -> tuple[Array, tuple[Any, ...]]:
  return kernel(*args), args


def _backward(
  kernel: Callable[..., Array],
  plain: Callable[..., Array],
  args: tuple[Any, ...],
  gradient: Array,
) -> tuple[Any, ...]:
  _, pullback = jax.vjp(plain, *args)
  gradients: tuple[Any, ...] = pullback(gradient)
  return gradients


with_plain_gradient.defvjp(_forward, _backward)

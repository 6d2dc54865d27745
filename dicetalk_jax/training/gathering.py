"""Parameters that devices share, gathered where a layer reads them.

Between steps every device holds a slice of each parameter (`parallel.param_spec`). A
layer needs the whole. It is gathered when the layer reads it, in the type that the
layer computes in, and its gradient returns to the slices at once. So a device never
holds all parameters, or all gradients, whole: inside a rematerialised block the
backward pass gathers again.
"""

from collections.abc import Mapping
import functools
from typing import Any

from flax import nnx
import jax
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from dicetalk_jax import parallel
from dicetalk_jax.models import parameters


def merge(graphdef: nnx.GraphDef[Any], params: Mapping[str, Any]) -> Any:
  """Builds the module of a structure and parameters whose layers gather what they read.

  Like `parameters.merge`, for use inside `jax.jit` with the mesh set.
  """
  model = parameters.merge(graphdef, params)
  modules = [module for _, module in nnx.iter_modules(model)]
  for module in modules:
    own = {name: x for name, x in vars(module).items() if isinstance(x, nnx.Param)}
    for name, param in own.items():
      # Layers with a kernel cast it to their type; norms compute in float32.
      dtype = getattr(module, 'dtype', None) if name == 'kernel' else None
      setattr(module, name, _Gathered(param.get_raw_value(), read_as=dtype))
  return model


class _Gathered(nnx.Param):
  """A parameter that is gathered each time it is read."""

  def get_value(self, **kwargs: Any) -> Any:
    return gather(super().get_value(**kwargs), self.get_metadata('read_as'))


def gather(x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
  """Returns the whole of a parameter on every device; its gradient is laid out like the
  parameter.

  Args:
    x: laid out by `parallel.param_spec`.
    dtype: cast to this type first, so that less is sent; None keeps the type.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if all(mesh.shape.get(axis, 1) == 1 for axis in parallel.PARAM_AXES):
    return x
  spec = parallel.param_spec(x.shape, mesh)
  if spec == P():
    return x
  return _gather(spec, x if dtype is None else x.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(spec: P, x: jax.Array) -> jax.Array:
  # The first constraint keeps the cast before the gathering.
  x = lax.with_sharding_constraint(x, spec)
  return lax.with_sharding_constraint(x, P())


def _forward(spec: P, x: jax.Array) -> tuple[jax.Array, None]:
  return _gather(spec, x), None


def _backward(spec: P, _: None, gradient: jax.Array) -> tuple[jax.Array]:
  # Each device has a sum over its own rows. Summing them whole and cutting out the slice
  # is one operation, a reduce-scatter, if nothing comes between.
  gradient = lax.with_sharding_constraint(gradient, P())
  return (lax.with_sharding_constraint(gradient, spec),)


_gather.defvjp(_forward, _backward)

"""Parameters that devices share, gathered where a layer reads them.

Between steps every device holds a slice of each parameter (`parallel.param_spec`), but
a layer needs the whole. It is gathered when the layer reads it, and its gradient goes
back to slices at once, so a device never holds all parameters or all gradients. In a
rematerialised block the backward pass gathers again.
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
  """Builds a module like `parameters.merge`; its layers gather what they read.

  Kernels are sent in the type that their layer computes in, everything else as it is:
  norms compute in float32.
  """
  model = parameters.merge(graphdef, params)
  for module in [module for _, module in nnx.iter_modules(model)]:
    for name, param in list(vars(module).items()):
      if not isinstance(param, nnx.Param):
        continue
      dtype = getattr(module, 'dtype', None) if name == 'kernel' else None
      setattr(module, name, _Gathered(param.get_raw_value(), read_as=dtype))
  return model


class _Gathered(nnx.Param[jax.Array]):
  """A parameter that is gathered whenever it is read."""

  def get_value(self, **index: Any) -> jax.Array:
    return gather(super().get_value(**index), self.get_metadata('read_as'))


def gather(x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
  """Gathers a parameter on every device; its gradient is laid out like itself.

  Without a mesh, or where devices share no parameters, it changes nothing.

  Args:
    x: laid out by `parallel.param_spec`.
    dtype: the type to send, and to return; None keeps that of x.
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
  # The first constraint keeps a cast in front of the gathering.
  x = lax.with_sharding_constraint(x, spec)
  return lax.with_sharding_constraint(x, P())


def _gather_forward(spec: P, x: jax.Array) -> tuple[jax.Array, None]:
  return _gather(spec, x), None


def _gather_backward(spec: P, _: None, gradient: jax.Array) -> tuple[jax.Array]:
  # The gradient of the constraint would be a whole array on every device. In this
  # layout compilers sum over devices and cut the slice in one operation, a
  # reduce-scatter.
  return (lax.with_sharding_constraint(gradient, spec),)


_gather.defvjp(_gather_forward, _gather_backward)

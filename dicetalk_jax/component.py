"""One component of a model folder in memory: structure and parameters, ready to be
compiled into stages.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import os
from typing import Any, Generic, TypeVar

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from dicetalk_jax import bundle, parallel
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.models import parameters, registry

NO_MESH = Mesh(np.empty((), object), ())

Config = TypeVar('Config', bound=parameters.ModelConfig)


@dataclasses.dataclass(frozen=True, eq=False)
class Component(Generic[Config]):
  """A component of a model folder.

  Attributes:
    config: its configuration.
    graphdef: its structure.
    params: its parameters.
    mesh: where it is computed; without a mesh, on one device.
  """

  config: Config
  graphdef: nnx.GraphDef
  params: parameters.Params
  mesh: Mesh = NO_MESH
  _stages: dict[Callable[..., Any], Callable[..., Any]] = dataclasses.field(
    default_factory=dict, init=False
  )

  @classmethod
  def load(
    cls,
    folder: os.PathLike | str,
    name: str,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike | None = None,
  ) -> 'Component[Any]':
    """Restores a component.

    Args:
      folder: model folder.
      name: of the component.
      mesh: its devices. Without a mesh it lives on one device, and its stages run
        there whatever mesh is set around them.
      dtype: of the computation.
      param_dtype: of the parameters in memory.

    Raises:
      WeightsError: the folder does not have it, or its parameters do not fit its
        configuration.
    """
    shardings = functools.partial(parallel.shardings, mesh=mesh) if mesh else None
    config, params = bundle.load_component(folder, name, shardings, param_dtype)
    graphdef, target = parameters.abstract(registry.builder(name, config, dtype))
    wanted = {key: x.shape for key, x in target.items()}
    found = {key: x.shape for key, x in params.items()}
    if wanted != found:
      raise WeightsError(
        f'{folder}: the parameters of {name} do not fit its configuration; save the '
        'component again'
      )
    return Component(
      registry.config_of(name, config), graphdef, params, mesh or NO_MESH
    )

  @classmethod
  def abstract(
    cls,
    folder: os.PathLike | str,
    name: str,
    dtype: jax.typing.DTypeLike | None = None,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
  ) -> 'Component[Any]':
    """A component of a model folder with shapes for parameters, to trace with.

    Arguments and errors as of `load`. No parameter is read.
    """
    _, entry = bundle.holder(folder, name)
    build = registry.builder(name, entry['config'], dtype)
    graphdef, shapes = parameters.abstract(build)
    params: Any = {
      key: jax.ShapeDtypeStruct(x.shape, param_dtype) for key, x in shapes.items()
    }
    return Component(registry.config_of(name, entry['config']), graphdef, params)

  @classmethod
  def load_frozen(
    cls, folder: os.PathLike | str, name: str, mesh: Mesh | None = None
  ) -> 'Component[Any]':
    """Restores a published network that makes features, in float32 however it was
    saved: in half precision SVD's autoencoder overflows, and CPUs lack it.

    Arguments and errors as of `load`.
    """
    return cls.load(folder, name, mesh, param_dtype=jnp.float32)

  @classmethod
  def load_or_random(
    cls,
    folder: os.PathLike | str,
    name: str,
    random: Mapping[str, Any] | None,
    seed: int,
  ) -> 'Component[Any]':
    """Restores a frozen component, or puts a random one into a folder that has none.

    Random components serve the tiny synthetic models only: no published weights exist
    at that size.

    Args:
      folder: model folder.
      name: of the component.
      random: configuration of the random component.
      seed: of its parameters.

    Raises:
      WeightsError: the folder has no such component and `random` is None.
    """
    if name not in bundle.components(folder):
      if random is None:
        raise WeightsError(
          f'{folder} has no {name}; name a model folder that has one with '
          '--config.model (python -m convert makes one from the published weights)'
        )
      config = registry.config_of(name, dict(random)).to_json()
      build = registry.builder(name, config)
      params = parameters.init_params(build, jax.random.key(seed))
      source = {'source': f'random, seed {seed}'}
      bundle.save_component(folder, name, config, params, source)
    return cls.load_frozen(folder, name)

  def stage(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function(model, *args)` and binds the parameters: call it with args.

    Compiles each function once.
    """
    if function not in self._stages:

      @jax.jit
      def compiled(params, *args):
        return function(parameters.merge(self.graphdef, params), *args)

      self._stages[function] = functools.partial(self._run, compiled)
    return self._stages[function]

  def shapes(self, function: Callable[..., Any], *args: Any) -> Any:
    """Shapes of what `function(model, *args)` returns for shapes of arguments."""

    def call(params, *args):
      return function(parameters.merge(self.graphdef, params), *args)

    return jax.eval_shape(call, self.params, *args)

  def _run(self, compiled: Callable[..., Any], *args: Any) -> Any:
    with jax.set_mesh(self.mesh):
      return compiled(self.params, *args)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Names what the component computes: equal for equal configuration and
    parameters.
    """
    return bundle.fingerprint(self.config.to_json(), self.params)

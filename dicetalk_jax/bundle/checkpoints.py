"""The components of a model folder: configuration in the index, parameters in Orbax."""

from collections.abc import Callable, Collection, Mapping
import hashlib
import json
import math
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from dicetalk_jax import orbax_paths, parallel
from dicetalk_jax.bundle.index import (
  Folder,
  absolute,
  components,
  first_line,
  holder,
  own_checkpoint,
  set_entries,
)
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.models.parameters import Abstract, Params

Shardings = Mapping[str, jax.sharding.Sharding]


def fingerprint(config: Mapping[str, Any], params: Mapping[str, Any]) -> str:
  """Identifies what a component computes: equal for equal configuration and values.

  In a job of several processes, all of them must call this.

  Args:
    config: in the JSON form that `registry.config_of(name, config).to_json()` gives.
    params: flat parameters; they are read one after the other.

  Returns:
    16 hexadecimal digits.
  """
  digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
  for name in sorted(params):
    value = np.ascontiguousarray(parallel.to_host(params[name]))
    digest.update(value.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()[:16]


def save_component(
  folder: Folder,
  name: str,
  config: Mapping[str, Any],
  params: Params,
  provenance: Mapping[str, Any],
  priors: str | None = None,
) -> None:
  """Writes or replaces one component.

  In a job of several processes, all of them must call this.

  Args:
    folder: made if missing.
    name: such as 'unet'; see `models.registry.COMPONENTS`.
    config: the JSON form of its configuration.
    params: flat parameters, wherever they live; each process writes its own shards.
      What a process holds alone must be equal on all.
    provenance: where the values came from: source files with SHA-256 and licence, or
      the run that trained them.
    priors: of an emotion model, the fingerprint of the embedder whose priors it learned
      on.
  """
  place = epath.Path(folder)
  old = own_checkpoint(components(place).get(name))
  number = 0 if old is None else int(old.rpartition('.')[2]) + 1
  checkpoint = f'{name}.{number}'
  place.mkdir(parents=True, exist_ok=True)

  # 1. Write the parameters.
  if jax.process_count() > 1:  # Orbax wants global arrays, or those of the host
    written = {key: _global_or_host(x) for key, x in params.items()}
  else:
    written = dict(params)
  context = ocp.Context()
  # Safe without copies: the call below blocks until the write is done.
  context.memory.deepcopy_host_arrays = False
  with context:
    # Overwrites what a killed run left.
    path = orbax_paths.plain(absolute(place / checkpoint))
    ocp.save(path, written, overwrite=True)

  # 2. Switch the index over to them, and remove what they replace.
  entry = {
    'config': dict(config),
    'provenance': dict(provenance),
    'checkpoint': checkpoint,
    'parameters': sum(math.prod(x.shape) for x in params.values()),
    'fingerprint': fingerprint(config, params),
  }
  if priors is not None:
    entry['priors'] = priors
  if jax.process_index() == 0:
    set_entries(place, {name: entry})
  multihost_utils.sync_global_devices(f'saved {checkpoint}')  # the next reader finds it


def _global_or_host(x: Any) -> Any:
  """An array over several processes as it is, any other on the host."""
  return np.asarray(x) if getattr(x, 'is_fully_addressable', True) else x


def load_component(
  folder: Folder,
  name: str,
  shardings: Callable[[Abstract], Shardings] | Shardings | None = None,
  dtype: jax.typing.DTypeLike | None = None,
  names: Collection[str] | None = None,
) -> tuple[dict[str, Any], Params]:
  """Reads one component.

  Args:
    folder: the model folder.
    name: of the component.
    shardings: by parameter name, or a function that makes them from the abstract
      parameters, such as `functools.partial(parallel.shardings, mesh=mesh)`: each
      device then reads only its part. None: the default device.
    dtype: type for all floating parameters; None keeps what was saved.
    names: of the parameters to read, of those there are; None reads all.

  Returns:
    Its configuration in JSON form (tuples have become lists) and its flat parameters.

  Raises:
    WeightsError: the folder or the component is missing (names what exists) or damaged.
  """
  place, entry = holder(folder, name)
  path = absolute(place / entry['checkpoint'])
  saved = _shapes(path)
  try:
    # 1. Decide the type and the place of each parameter.
    target = {
      key: jax.ShapeDtypeStruct(x.shape, _cast(x.dtype, dtype))
      for key, x in saved.items()
      if names is None or key in names
    }
    if shardings is None:
      device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      shardings = dict.fromkeys(target, device)
    elif callable(shardings):
      shardings = shardings(target)
    target = {
      key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[key])
      for key, x in target.items()
    }
    # 2. Read them.
    context = ocp.Context()
    context.pytree.loading.partial_load = names is not None
    with context:
      return entry['config'], ocp.load(orbax_paths.plain(path), target)
  except (ValueError, OSError) as error:
    raise _unreadable(path, error) from error


def shapes(folder: Folder, name: str) -> Abstract:
  """Shapes and types of a component's parameters, without reading them.

  Raises:
    WeightsError: see `load_component`.
  """
  place, entry = holder(folder, name)
  return _shapes(absolute(place / entry['checkpoint']))


def _shapes(path: epath.Path) -> Abstract:
  """Shapes and types of the parameters in a checkpoint."""
  _mend(path)
  try:
    saved = ocp.metadata(orbax_paths.plain(path)).metadata
    if saved is None:
      raise ValueError('its list of parameters is damaged')
    return {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in saved.items()}
  except (ValueError, OSError) as error:
    raise _unreadable(path, error) from error


def _mend(path: epath.Path) -> None:
  """Completes a checkpoint that an older version wrote below an odd name."""
  try:
    orbax_paths.mend(path)
  except (ValueError, OSError) as error:
    raise WeightsError(
      f'{path} was left incomplete by an older version of this program and cannot be '
      f'completed ({first_line(error)}); make it writable once, or copy the model '
      'folder again'
    ) from error


def _unreadable(path: epath.Path, error: Exception) -> WeightsError:
  return WeightsError(
    f'{path} cannot be read ({first_line(error)}); copy the model folder again'
  )


def _cast(
  saved: jax.typing.DTypeLike, wanted: jax.typing.DTypeLike | None
) -> jax.typing.DTypeLike:
  """The type to restore a parameter in."""
  if wanted is not None and jnp.issubdtype(saved, jnp.floating):
    return wanted
  return saved

"""A model folder on disk: components, their configurations, where they came from, settings and emotion priors.

    bundle.json           format version; per component its config, provenance and checkpoint folder; settings
    <component>.<n>/      one Orbax checkpoint of flat parameters by dotted name
    priors/<emotion>.npz  mean and standard deviation of one Gaussian per emotion

`bundle.json` is the switch: a component is saved beside its predecessor, then the file is replaced, then the
predecessor is removed. A run that is killed in between leaves the old model whole. Folders may be local or remote
(`gs://...`).
"""

from collections.abc import Callable, Collection, Mapping
import json
import math
from typing import Any
import zipfile

from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from dicetalk_jax import orbax_paths
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.models.core import Abstract, Params

FORMAT = 1
INDEX = 'bundle.json'
PRIORS = 'priors'

Shardings = Mapping[str, jax.sharding.Sharding]
Prior = tuple[np.ndarray, np.ndarray]


def components(folder) -> dict[str, dict[str, Any]]:
  """What the folder holds: component name -> entry with `config`, `provenance`, `checkpoint`, `parameters`.

  A folder that does not exist holds nothing.

  Raises:
    WeightsError: the folder is damaged or of a newer format.
  """
  return _index(folder)['components']


def settings(folder) -> dict[str, Any]:
  """Values that belong to the model but to no component (`pipeline.Settings`); missing ones have their defaults."""
  return _index(folder)['settings']


def save_component(folder, name: str, config: Mapping[str, Any], params: Params, provenance: Mapping[str, Any]) -> None:
  """Writes or replaces one component. In a job of several processes, all of them must call this.

  Args:
    folder: made if missing.
    name: such as 'unet'; see `models.registry.COMPONENTS`.
    config: the JSON form of its configuration.
    params: flat parameters, wherever they live; each process writes its own shards. What a process holds alone must
      be equal on all.
    provenance: where the values came from: source files with SHA-256 and licence, or the run that trained them.
  """
  folder = epath.Path(folder)
  old = components(folder).get(name, {}).get('checkpoint')
  new = f'{name}.{int(old.rpartition(".")[2]) + 1 if old else 0}'
  folder.mkdir(parents=True, exist_ok=True)
  context = ocp.Context()
  context.memory.deepcopy_host_arrays = False     # nobody changes them meanwhile: the call waits for its end
  if jax.process_count() > 1:                     # Orbax wants global arrays, or those of the host
    params = {k: np.asarray(x) if getattr(x, 'is_fully_addressable', True) else x for k, x in params.items()}
  with context:
    # overwrites what a killed run left
    ocp.save(orbax_paths.plain(_local(folder / new)), dict(params), overwrite=True)
  if jax.process_index() == 0:
    index = _index(folder)
    index['components'][name] = dict(
        config=dict(config), provenance=dict(provenance), checkpoint=new,
        parameters=sum(math.prod(x.shape) for x in params.values()))
    _write_index(folder, index)
    if old:
      (folder / old).rmtree(missing_ok=True)
  multihost_utils.sync_global_devices(f'saved {new}')  # who reads it next finds it


def save_settings(folder, values: Mapping[str, Any]) -> None:
  """Adds to, or changes, the settings of the folder."""
  if jax.process_index() == 0:
    index = _index(folder)
    index['settings'].update(values)
    _write_index(folder, index)


def load_component(folder, name: str, shardings: Callable[[Abstract], Shardings] | Shardings | None = None,
                   dtype: jax.typing.DTypeLike | None = None,
                   names: Collection[str] | None = None) -> tuple[dict[str, Any], Params]:
  """Reads one component.

  Args:
    folder: the model folder.
    name: of the component.
    shardings: by parameter name, or a function that makes them from the abstract parameters, such as
      `functools.partial(parallel.shardings, mesh=mesh)`: each device then reads only its part. None: the default
      device.
    dtype: type for all floating parameters; None keeps what was saved.
    names: of the parameters to read, of those there are; None reads all.

  Returns:
    Its configuration in JSON form (tuples have become lists) and its flat parameters.

  Raises:
    WeightsError: the folder or the component is missing (names what exists) or damaged.
  """
  entry = require(folder, name)[name]
  path = _local(epath.Path(folder) / entry['checkpoint'])
  saved = shapes(folder, name)
  try:
    target = {k: jax.ShapeDtypeStruct(x.shape, _cast(x.dtype, dtype)) for k, x in saved.items()
              if names is None or k in names}
    if shardings is None:
      shardings = dict.fromkeys(target, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    elif callable(shardings):
      shardings = shardings(target)
    target = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[k]) for k, x in target.items()}
    context = ocp.Context()
    context.pytree.loading.partial_load = names is not None
    with context:
      return entry['config'], ocp.load(orbax_paths.plain(path), target)
  except (ValueError, OSError) as error:
    raise _unreadable(path, error) from error


def shapes(folder, name: str) -> Abstract:
  """Shapes and types of a component's parameters, without reading them.

  Raises:
    WeightsError: see `load_component`.
  """
  path = _local(epath.Path(folder) / require(folder, name)[name]['checkpoint'])
  try:
    orbax_paths.mend(path)
    if (saved := ocp.metadata(orbax_paths.plain(path)).metadata) is None:
      raise ValueError('its list of parameters is damaged')
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in saved.items()}
  except (ValueError, OSError) as error:
    raise _unreadable(path, error) from error


def require(folder, *names: str) -> dict[str, dict[str, Any]]:
  """Checks that the components exist, without reading weights; returns `components(folder)`.

  Raises:
    WeightsError: names all that is missing, and what exists.
  """
  if not (epath.Path(folder) / INDEX).exists():
    raise WeightsError(f'{folder} is no model folder (it has no {INDEX}); '
                       'make one with python -m convert or by training')
  known = components(folder)
  if missing := [name for name in names if name not in known]:
    raise WeightsError(f'{folder} has no {" and no ".join(missing)}; it has: {", ".join(sorted(known)) or "nothing"}')
  return known


def save_priors(folder, priors: Mapping[str, Prior]) -> None:
  """Writes or replaces the Gaussians of some emotions: name -> (mean, standard deviation), float32 `[256]` each."""
  if jax.process_index() != 0:
    return
  place = epath.Path(folder) / PRIORS
  place.mkdir(parents=True, exist_ok=True)
  aside = {emotion: place / f'.{emotion}.part' for emotion in priors}
  try:
    for emotion, (mu, sigma) in priors.items():
      with aside[emotion].open('wb') as file:
        np.savez(file, mu=np.asarray(mu, np.float32), sigma=np.asarray(sigma, np.float32))
    for emotion, path in aside.items():     # all or none
      path.replace(place / f'{emotion}.npz')
  finally:
    for path in aside.values():
      path.unlink(missing_ok=True)


def emotions(folder) -> list[str]:
  """Names of the emotions that the folder has a prior for, sorted."""
  return sorted(path.stem for path in (epath.Path(folder) / PRIORS).glob('*.npz') if not path.name.startswith('.'))


def load_priors(folder) -> dict[str, Prior]:
  """All priors: emotion -> (mean, standard deviation), float32."""
  return {emotion: load_prior(folder, emotion) for emotion in emotions(folder)}


def load_prior(folder, emotion: str) -> Prior:
  """The prior of one emotion.

  Raises:
    WeightsError: the folder does not have it (names those it has), or the file is damaged.
  """
  if emotion not in emotions(folder):
    known = ', '.join(emotions(folder)) or 'none'
    raise WeightsError(f"there is no emotion '{emotion}' in {folder}; it has: {known}")
  path = epath.Path(folder) / PRIORS / f'{emotion}.npz'
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      return np.float32(arrays['mu']), np.float32(arrays['sigma'])
  except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
    raise WeightsError(f'{path} is no emotion prior (two arrays, mu and sigma); copy the model folder again') from error


def _index(folder) -> dict[str, Any]:
  path = epath.Path(folder) / INDEX
  if not path.exists():
    return dict(format=FORMAT, components={}, settings={})
  try:
    index = json.loads(path.read_text())
    version = index['format']
    index['components'], index['settings']  # both are part of the format
  except (ValueError, KeyError, TypeError) as error:
    raise WeightsError(f'{path} is damaged; copy the model folder again') from error
  if version != FORMAT:
    raise WeightsError(f'{path} has format {version}, this program reads {FORMAT}; update the program')
  return index


def _write_index(folder, index: dict[str, Any]) -> None:
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  aside = folder / f'.{INDEX}.part'
  aside.write_text(json.dumps(index, indent=2, sort_keys=True) + '\n')
  aside.replace(folder / INDEX)


def _unreadable(path: epath.Path, error: Exception) -> WeightsError:
  cause = str(error).partition('\n')[0]
  return WeightsError(f'{path} cannot be read ({cause}); copy the model folder again')


def _local(path: epath.Path) -> epath.Path:
  """Orbax wants absolute paths."""
  return path if '://' in str(path) else path.resolve()


def _cast(saved, wanted):
  return wanted if wanted is not None and jnp.issubdtype(saved, jnp.floating) else saved

"""A model folder on disk: components, settings and emotion priors.

    bundle.json           format version; settings; one entry per component
    <component>.<n>/      one Orbax checkpoint of flat parameters by dotted name
    priors/<emotion>.npz  mean and standard deviation of one Gaussian per emotion,
                          and the fingerprint of the embedder that made it

The entry of a component has its `config`, its `provenance`, the number of its
`parameters`, its `fingerprint` and the folder of its `checkpoint`. A component that
belongs to another model folder is a reference: its entry has that folder too, under
`folder`, and is only valid while the fingerprint there is the same
(`model_references.py` makes references and packs portable copies). The entry of an
emotion model also names the embedder whose `priors` it learned on.

`bundle.json` is the switch: a component is saved next to its predecessor, then the
file is replaced, then the predecessor is removed. A run that is killed in between
leaves the old model whole. Folders may be local or remote (`gs://...`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import hashlib
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

from dicetalk_jax import orbax_paths, parallel
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.models.parameters import Abstract, Params

FORMAT = 2  # 1 has no fingerprints and no references; it is still read
INDEX = 'bundle.json'
PRIORS = 'priors'
EMOTION_MODEL = 'emo_model'
RELEASED = 'released'  # in place of a fingerprint: the embedder was not published

Shardings = Mapping[str, jax.sharding.Sharding]
Prior = tuple[np.ndarray, np.ndarray]


def components(folder) -> dict[str, dict[str, Any]]:
  """The components of the folder: name -> entry, as described above.

  A folder that does not exist holds nothing.

  Raises:
    WeightsError: the folder is damaged or of a newer format.
  """
  return _index(folder)['components']


def settings(folder) -> dict[str, Any]:
  """Values that belong to the model but to no component (`pipeline.Settings`);
  missing ones have their defaults.
  """
  return _index(folder)['settings']


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
    digest.update(value.reshape(-1).view(np.uint8))
  return digest.hexdigest()[:16]


def save_component(
  folder,
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
  folder = epath.Path(folder)
  old = _own_checkpoint(components(folder).get(name))
  checkpoint = f'{name}.{int(old.rpartition(".")[2]) + 1 if old else 0}'
  folder.mkdir(parents=True, exist_ok=True)

  # 1. Write the parameters.
  context = ocp.Context()
  context.memory.deepcopy_host_arrays = (
    False  # safe: this call blocks until the write is done
  )
  if jax.process_count() > 1:  # Orbax wants global arrays, or those of the host
    params = {
      k: np.asarray(x) if getattr(x, 'is_fully_addressable', True) else x
      for k, x in params.items()
    }
  with context:
    # Overwrites what a killed run left.
    ocp.save(
      orbax_paths.plain(_local(folder / checkpoint)), dict(params), overwrite=True
    )

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
    set_entries(folder, {name: entry})
  multihost_utils.sync_global_devices(f'saved {checkpoint}')  # the next reader finds it


def set_entries(folder, entries: Mapping[str, Mapping[str, Any] | None]) -> None:
  """Sets entries of the index, or removes those that are None, with the checkpoints
  that they replace.

  Process 0 calls this alone.
  """
  folder = epath.Path(folder)
  index = _index(folder)
  replaced = []
  for name, entry in entries.items():
    old = index['components'].pop(name, None)
    if entry is not None:
      index['components'][name] = entry
    if _own_checkpoint(old) not in (None, _own_checkpoint(entry)):
      replaced.append(folder / old['checkpoint'])
  _write_index(folder, index)
  for checkpoint in replaced:
    checkpoint.rmtree(missing_ok=True)


def holder(folder, name: str) -> tuple[epath.Path, dict[str, Any]]:
  """The model folder that has the checkpoint of a component, and the component's entry
  there.

  Raises:
    WeightsError: the component is missing; or it is a reference, and the folder that it
      refers to has lost it or has another one by now.
  """
  entry = require(folder, name)[name]
  if 'folder' not in entry:
    return epath.Path(folder), entry
  place = epath.Path(entry['folder'])
  theirs = components(place).get(name)
  if theirs is None or 'folder' in theirs:
    raise WeightsError(
      f'{folder} takes its {name} from {place}, which has none now; put that folder '
      f'back, or change the path in {INDEX}'
    )
  if not same(entry, theirs):
    raise WeightsError(
      f'{folder} takes its {name} from {place}, which has another one by now; put the '
      'old one back, or train again with the new one'
    )
  return place, theirs


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
  """Whether two entries are of equal components.

  Entries of format 1 have no fingerprints: these must be the same checkpoint, made
  from the same sources.
  """
  if 'fingerprint' in one or 'fingerprint' in other:
    return one.get('fingerprint') == other.get('fingerprint')
  keys = ('checkpoint', 'config', 'parameters', 'provenance')
  return all(one[key] == other[key] for key in keys)


def save_settings(folder, values: Mapping[str, Any]) -> None:
  """Adds to, or changes, the settings of the folder."""
  if jax.process_index() == 0:
    index = _index(folder)
    index['settings'].update(values)
    _write_index(folder, index)


def clear_settings_and_priors(folder) -> None:
  """Removes both. Process 0 calls this alone."""
  folder = epath.Path(folder)
  if settings(folder):
    _write_index(folder, _index(folder) | {'settings': {}})
  for emotion in emotions(folder):
    (folder / PRIORS / f'{emotion}.npz').unlink()


def load_component(
  folder,
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
  path = _local(place / entry['checkpoint'])
  saved = _shapes(path)
  try:
    target = {
      k: jax.ShapeDtypeStruct(x.shape, _cast(x.dtype, dtype))
      for k, x in saved.items()
      if names is None or k in names
    }
    if shardings is None:
      shardings = dict.fromkeys(
        target, jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
      )
    elif callable(shardings):
      shardings = shardings(target)
    target = {
      k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[k])
      for k, x in target.items()
    }
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
  place, entry = holder(folder, name)
  return _shapes(_local(place / entry['checkpoint']))


def _shapes(path: epath.Path) -> Abstract:
  """Of the parameters in a checkpoint."""
  _mend(path)
  try:
    if (saved := ocp.metadata(orbax_paths.plain(path)).metadata) is None:
      raise ValueError('its list of parameters is damaged')
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in saved.items()}
  except (ValueError, OSError) as error:
    raise _unreadable(path, error) from error


def _mend(path: epath.Path) -> None:
  """Completes a checkpoint of an older version below an odd name
  (`orbax_paths.mend`).
  """
  try:
    orbax_paths.mend(path)
  except (ValueError, OSError) as error:
    raise WeightsError(
      f'{path} was left incomplete by an older version of this program and cannot be '
      f'completed ({_first_line(error)}); make it writable once, or copy the model '
      'folder again'
    ) from error


def require(folder, *names: str) -> dict[str, dict[str, Any]]:
  """Checks that the components exist, without reading weights; returns
  `components(folder)`.

  Raises:
    WeightsError: names all that is missing, and what exists.
  """
  if not _exists(epath.Path(folder) / INDEX):
    raise WeightsError(
      f'{folder} is no model folder (it has no {INDEX}); '
      'make one with python -m convert or by training'
    )
  known = components(folder)
  if missing := [name for name in names if name not in known]:
    raise WeightsError(
      f'{folder} has no {" and no ".join(missing)}; it has: '
      f'{", ".join(sorted(known)) or "nothing"}'
    )
  return known


def save_priors(
  folder, priors: Mapping[str, Prior], embedder: str = '', *, replace: bool = False
) -> None:
  """Writes or replaces the Gaussians of some emotions.

  Args:
    folder: made if missing.
    priors: emotion -> (mean, standard deviation), float32 `[256]` each.
    embedder: fingerprint of the embedder that made them; '' if it is not known.
    replace: whether they may replace priors of other embedders.

  Raises:
    WeightsError: one of them would replace the prior of another embedder. Nothing is
      written then.
  """
  if not replace:
    check_replaceable(folder, priors, embedder)
  if jax.process_index() != 0:
    return
  place = epath.Path(folder) / PRIORS
  with _writing(place):
    place.mkdir(parents=True, exist_ok=True)
    _write_priors(place, priors, embedder)


def _write_priors(
  place: epath.Path, priors: Mapping[str, Prior], embedder: str
) -> None:
  """All or none."""
  parts = {emotion: place / f'.{emotion}.part' for emotion in priors}
  try:
    for emotion, (mu, sigma) in priors.items():
      with parts[emotion].open('wb') as file:
        np.savez(
          file,
          mu=np.asarray(mu, np.float32),
          sigma=np.asarray(sigma, np.float32),
          embedder=np.array(embedder),
        )
    for emotion, path in parts.items():
      path.replace(place / f'{emotion}.npz')
  finally:
    for path in parts.values():
      path.unlink(missing_ok=True)


def check_replaceable(folder, names: Collection[str], embedder: str) -> None:
  """Raises WeightsError where priors of another embedder have one of the names.

  An unknown embedder, '', counts as another one than a known one.
  """
  for emotion in sorted(set(names) & set(emotions(folder))):
    theirs = read_prior(folder, emotion)[1]
    if theirs not in ('', embedder):
      raise WeightsError(
        f"{folder} has the emotion '{emotion}' of another embedder ({theirs}, not "
        f'{embedder or "an unknown one"}), which is never replaced, since the emotion '
        'model may have learned on it; choose another name, or a model folder of this '
        'embedder'
      )


def emotions(folder) -> list[str]:
  """Names of the emotions that the folder has a prior for, sorted."""
  return sorted(
    path.stem
    for path in (epath.Path(folder) / PRIORS).glob('*.npz')
    if not path.name.startswith('.')
  )


def load_priors(folder, embedder: str = '') -> dict[str, Prior]:
  """Priors by emotion: (mean, standard deviation), float32.

  Args:
    folder: the model folder.
    embedder: a fingerprint leaves out the priors of other embedders; '' keeps all,
      whether the emotion model of the folder can read them or not.
  """
  priors = {}
  for emotion in emotions(folder):
    prior, theirs = read_prior(folder, emotion)
    if not embedder or theirs in ('', embedder):
      priors[emotion] = prior
  return priors


def learned_priors(folder) -> str:
  """The embedder whose priors the emotion model of the folder learned on; '' if
  unknown.
  """
  return components(folder).get(EMOTION_MODEL, {}).get('priors', '')


def readable(embedder: str, learned_on: str) -> bool:
  """Whether an emotion model understands priors, as far as both embedders are known."""
  return '' in (embedder, learned_on) or embedder == learned_on


def load_prior(folder, emotion: str) -> Prior:
  """The prior of one emotion, for the emotion model of the folder.

  Raises:
    WeightsError: the folder does not have it (names those it has), the file is damaged,
      or the emotion model learned on the priors of another embedder.
  """
  if emotion not in emotions(folder):
    known = ', '.join(emotions(folder)) or 'none'
    raise WeightsError(f"there is no emotion '{emotion}' in {folder}; it has: {known}")
  prior, embedder = read_prior(folder, emotion)
  learned_on = learned_priors(folder)
  if not readable(embedder, learned_on):
    raise WeightsError(
      f"the emotion '{emotion}' of {folder} comes from the embedder {embedder}, but "
      f'the emotion model there learned on priors of another one ({learned_on}) and '
      'would misread it; train the diffusion model with this embedder, or delete '
      f'{PRIORS}/{emotion}.npz there and use a prior that belongs to the model'
    )
  return prior


def read_prior(folder, emotion: str) -> tuple[Prior, str]:
  """A prior and the fingerprint of its embedder ('' if unknown), whatever the emotion
  model of the folder.

  Raises:
    WeightsError: the file is missing or damaged.
  """
  path = epath.Path(folder) / PRIORS / f'{emotion}.npz'
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      prior = np.float32(arrays['mu']), np.float32(arrays['sigma'])
      return prior, str(arrays['embedder']) if 'embedder' in arrays else ''
  except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
    raise WeightsError(
      f'{path} is no emotion prior (two arrays, mu and sigma); copy the model folder '
      'again'
    ) from error


def _exists(path: epath.Path) -> bool:
  try:
    return path.exists()
  except Exception as error:  # each kind of storage has its own errors
    raise WeightsError(
      f'{path} cannot be reached ({_first_line(error)}); check the address and your '
      'access to it'
    ) from error


def _index(folder) -> dict[str, Any]:
  path = epath.Path(folder) / INDEX
  if not _exists(path):
    return dict(format=FORMAT, components={}, settings={})
  try:
    index = json.loads(path.read_text())
    version = index['format']
    index['components'], index['settings']  # both are part of the format
  except (ValueError, KeyError, TypeError) as error:
    raise WeightsError(f'{path} is damaged; copy the model folder again') from error
  if version not in range(1, FORMAT + 1):
    raise WeightsError(
      f'{path} has format {version}, this program reads {FORMAT}; update the program'
    )
  index['format'] = FORMAT
  return index


def _write_index(folder, index: dict[str, Any]) -> None:
  folder = epath.Path(folder)
  part = folder / f'.{INDEX}.part'
  with _writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(index, indent=2, sort_keys=True) + '\n')
    part.replace(folder / INDEX)


@contextlib.contextmanager
def _writing(place: epath.Path) -> Iterator[None]:
  """Turns the system's refusal into InputError."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f'cannot write {place}: {error.strerror or error}; check its permissions, or '
      'choose another model folder'
    ) from error


def _own_checkpoint(entry: Mapping[str, Any] | None) -> str | None:
  """The checkpoint that the folder of the entry has itself: None for a reference."""
  return None if entry is None or 'folder' in entry else entry['checkpoint']


def _unreadable(path: epath.Path, error: Exception) -> WeightsError:
  return WeightsError(
    f'{path} cannot be read ({_first_line(error)}); copy the model folder again'
  )


def _first_line(error: Exception) -> str:
  return str(error).partition('\n')[0]


def absolute(path: epath.Path) -> str:
  """The path from anywhere; addresses (`gs://`) stay as they are."""
  return str(_local(path))


def _local(path: epath.Path) -> epath.Path:
  """Orbax wants absolute paths."""
  return path if '://' in str(path) else path.resolve()


def _cast(saved, wanted):
  return wanted if wanted is not None and jnp.issubdtype(saved, jnp.floating) else saved

"""Model folders that build on others, without copying or changing them.

Training reads one model folder and writes another. What it does not train stays where
it is: the new folder refers to it by path and fingerprint (`bundle.holder` follows and
checks the reference). `pack` copies everything into one portable folder.
"""

from collections.abc import Callable, Collection
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils

from dicetalk_jax import bundle
from dicetalk_jax.errors import InputError, WeightsError


def adopt(
    source, folder, *, trained: Collection[str], priors: bool, resuming: bool
) -> None:
  """Lets a run's model folder refer to everything that the run does not train.

  All processes of a job must call this together.

  Args:
    source: the model folder that the run reads, or '' for none; it is not changed.
    folder: the model folder that the run writes.
    trained: names of the components that the run trains.
    priors: whether the emotion priors of `source` are copied: not where the run trains
      the embedder that makes new ones.
    resuming: the run has begun with what `folder` refers to already, and cannot
      continue with something else.

  Raises:
    WeightsError: `source` is not a model folder or misses a component that it refers
      to; or the run began with another component than `source` has by now.
  """
  known = bundle.require(source) if source else {}
  old = bundle.components(folder)
  new = {}
  for name in sorted(known.keys() - set(trained)):
    new[name] = _reference(source, name)
    if resuming and name in old and not bundle.same(old[name], new[name]):
      raise WeightsError(
          f'this run began with another {name} than {source} has now; name the model '
          'folder that it began with in config.model, or choose another --workdir'
      )
  stale = [] if resuming else [name for name, entry in old.items() if 'folder' in entry]
  if jax.process_index() == 0 and (stale or source):
    bundle.set_entries(folder, dict.fromkeys(stale) | new)
  if jax.process_index() == 0 and source:
    bundle.save_settings(folder, bundle.settings(source) | bundle.settings(folder))
    if priors:
      _copy_priors(source, folder)
  multihost_utils.sync_global_devices('adopted')  # the others read it next


def _reference(source, name: str) -> dict[str, Any]:
  """The entry of a reference, to the folder that has the checkpoint itself."""
  place, entry = bundle.holder(source, name)
  remote = '://' in str(place)
  return entry | {'folder': str(place if remote else place.expanduser().resolve())}


def _copy_priors(source, folder) -> None:
  for emotion in bundle.emotions(source):
    prior, embedder = bundle.read_prior(source, emotion)
    bundle.save_priors(folder, {emotion: prior}, embedder, replace=True)


def pack(
    folder,
    destination,
    *,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> None:
  """Copies a model folder with everything that it refers to.

  The copy is written next to the destination and moved there when it is whole.

  Args:
    folder: the model folder.
    destination: must not exist, or be empty.
    overwrite: replaces a model folder that is there already.
    progress: called with ('packing', files done, files in all) after every file.

  Raises:
    WeightsError: `folder` is not a model folder, or a reference of it has changed.
    InputError: the destination exists, or cannot be written.
  """
  destination = epath.Path(destination).expanduser()
  places = {name: bundle.holder(folder, name) for name in bundle.require(folder)}
  _check_destination(folder, destination, places, overwrite)
  part = destination.parent / f'.{destination.name}.part'

  # 1. List what is to be copied.
  files = {}
  for place, entry in places.values():
    checkpoint = place / entry['checkpoint']
    for path in _files_below(checkpoint):
      files[path] = part / entry['checkpoint'] / path.relative_to(checkpoint)
  for emotion in bundle.emotions(folder):
    path = epath.Path(folder) / bundle.PRIORS / f'{emotion}.npz'
    files[path] = part / bundle.PRIORS / path.name

  # 2. Copy it, and move the whole into place.
  try:
    _discard(part)  # what a killed run left
    for done, (path, target) in enumerate(files.items(), 1):
      target.parent.mkdir(parents=True, exist_ok=True)
      path.copy(target)
      progress('packing', done, len(files))
    bundle.save_settings(part, bundle.settings(folder))
    bundle.set_entries(part, {name: entry for name, (_, entry) in places.items()})
    _discard(destination)
    part.rename(destination)
  except OSError as error:
    raise InputError(
        f'cannot write {destination}: {error.strerror or error}; choose another place'
    ) from error
  finally:
    _discard(part)


def _check_destination(folder, destination: epath.Path, places, overwrite: bool) -> None:
  """Raises InputError where something may not be replaced."""
  if not destination.exists():
    return
  if not destination.is_dir():
    raise InputError(f'cannot write {destination}: it is a file; name a folder')
  if not any(destination.iterdir()):
    return
  if not overwrite:
    raise InputError(
        f'{destination} exists; choose another place, or add --overwrite to replace it'
    )
  if not (destination / bundle.INDEX).exists():
    raise InputError(
        f'{destination} exists and is not a model folder (it has no {bundle.INDEX}); '
        'choose another place'
    )
  needed = {epath.Path(folder).resolve(), *(place.resolve() for place, _ in places.values())}
  if destination.resolve() in needed:
    raise InputError(
        f'{destination} is where the model comes from; choose another place'
    )


def _discard(folder: epath.Path) -> None:
  if folder.exists():
    folder.rmtree()


def _files_below(folder: epath.Path) -> list[epath.Path]:
  """All files below a folder, local or remote."""
  files = []
  for path in sorted(folder.iterdir()):
    files += _files_below(path) if path.is_dir() else [path]
  return files

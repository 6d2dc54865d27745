"""Model folders that build on others, without copying or changing them.

Training reads one model folder and writes another. What it does not train stays where
it is: the new folder refers to it by path and fingerprint (`bundle.holder` follows and
checks the reference). `pack` copies everything into one portable folder.
"""

from collections.abc import Collection
import os
import pathlib

from etils import epath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp

from dicetalk_jax import bundle
from dicetalk_jax.bundle import Entry, Folder, ModelFolder
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.files import atomic_folder, refuse_existing, require_room
from dicetalk_jax.progress import Progress, silent


def adopt(
  source: Folder,
  folder: Folder,
  *,
  trained: Collection[str],
  needed: Collection[str],
  priors: bool,
  resuming: bool,
) -> None:
  """Lets a run's model folder refer to everything that the run does not train.

  All processes of a job must call this together. Everything that can be wrong is found
  on all of them, before process 0 writes.

  Args:
    source: the model folder that the run reads, or '' for none; it is not changed.
    folder: the model folder that the run writes.
    trained: names of the components that the run trains.
    needed: names of the frozen components that the run computes with.
    priors: whether the emotion priors of `source` are copied: not where the run trains
      the embedder that makes new ones.
    resuming: the run has begun with what `folder` refers to already, and cannot
      continue with something else. Otherwise what an earlier start left is replaced.

  Raises:
    WeightsError: `source` is not a model folder, misses something needed that it refers
      to, or has a damaged prior; or the run began with another component than `source`
      has by now.
  """
  # 1. Check what the folder is to refer to, on all processes.
  references: dict[str, Entry] = {}
  copied: dict[str, tuple[bundle.Prior, str]] = {}
  settings = {}
  if source:
    model = ModelFolder.open(source)
    model.require()
    references = _references(model, folder, trained, needed, resuming)
    settings = model.settings
    if priors:
      copied = {
        emotion: bundle.read_prior(model, emotion) for emotion in bundle.emotions(model)
      }

  # 2. Write it, on one.
  if jax.process_index() == 0:
    if not resuming:
      _forget(folder)
    if references:
      bundle.set_entries(folder, references)
    if settings:
      bundle.save_settings(folder, settings | bundle.settings(folder))
    for emotion, (prior, embedder) in copied.items():
      bundle.save_priors(folder, {emotion: prior}, embedder, replace=True)
  multihost_utils.sync_global_devices('adopted')  # the others read it next


def _references(
  source: ModelFolder,
  folder: Folder,
  trained: Collection[str],
  needed: Collection[str],
  resuming: bool,
) -> dict[str, Entry]:
  """The entries of references to what the run does not train; see `adopt`."""
  old = bundle.components(folder)
  references = {}
  for name in sorted(source.components.keys() - set(trained)):
    reference = _reference(source, name, folder, name in needed)
    if reference is None:
      continue
    is_old = resuming and name in needed and name in old
    if is_old and not bundle.same(old[name], reference):
      raise WeightsError(
        f'this run began with another {name} than {source} has now; name the model '
        'folder that it began with in config.model, or choose another --workdir'
      )
    references[name] = reference
  return references


def _reference(
  source: ModelFolder, name: str, folder: Folder, needed: bool
) -> Entry | None:
  """The entry of a reference, to the folder that has the checkpoint itself.

  None where that is `folder` itself, or where the checkpoint is lost and not needed.
  """
  try:
    place, entry = bundle.holder(source, name)
  except WeightsError:
    if needed:
      raise
    return None
  if os.path.realpath(place) == os.path.realpath(folder):
    return None
  return entry | {'folder': str(bundle.absolute(place))}


def _forget(folder: Folder) -> None:
  """Removes what an earlier start of the run took from another model folder."""
  components = bundle.components(folder)
  stale = [name for name, entry in components.items() if 'folder' in entry]
  if stale:
    bundle.set_entries(folder, dict.fromkeys(stale))
  bundle.clear_settings(folder)
  bundle.clear_priors(folder)


def pack(
  folder: Folder,
  destination: str | os.PathLike[str],
  *,
  overwrite: bool = False,
  half: bool = False,
  progress: Progress = silent,
) -> None:
  """Copies a model folder with everything that it refers to.

  The copy is atomic: it gets its name when it is whole, and until then what it
  replaces stays.

  Args:
    folder: the model folder, local or remote.
    destination: a local folder.
    overwrite: whether to replace a model folder that is there already.
    half: whether to store parameters as float16. The embedder stays as it is: priors
      name it by its values.
    progress: called with ('packing', files done, files in all) after every file.

  Raises:
    WeightsError: `folder` is not a model folder, a component of it is damaged, or a
      reference has changed.
    InputError: the destination exists, is too small, overlaps with what is copied, or
      cannot be written.
  """
  # 1. Check everything.
  destination = pathlib.Path(destination)
  model = ModelFolder.open(folder)
  model.require()
  holders = {}
  for name in model.components:
    bundle.shapes(model, name)  # refuses a damaged component
    holders[name] = bundle.holder(model, name)
  _check_apart(destination, [model.path, *(place for place, _ in holders.values())])
  refuse_existing(destination, overwrite, bundle.INDEX)

  # 2. List what is to be copied, and what is written in half precision.
  cast = set(holders) - {'embedder'} if half else set()
  files = {}
  for name, (place, entry) in holders.items():
    if name not in cast:
      for path in _files_below(place / entry['checkpoint']):
        files[path] = path.relative_to(place)
  for emotion in bundle.emotions(model):
    path = model.path / bundle.PRIORS / f'{emotion}.npz'
    files[path] = path.relative_to(model.path)
  require_room(destination, sum(path.stat().length for path in files))

  # 3. Copy it.
  with atomic_folder(destination) as part:
    for done, (path, name) in enumerate(files.items(), 1):
      (part / name).parent.mkdir(parents=True, exist_ok=True)
      path.copy(part / name)
      progress('packing', done, len(files))
    bundle.save_settings(part, model.settings)
    copied = {name: entry for name, (_, entry) in holders.items() if name not in cast}
    bundle.set_entries(part, copied)
    for name in sorted(cast):
      _, entry = holders[name]
      config, params = bundle.load_component(model, name, dtype=jnp.float16)
      provenance = entry['provenance'] | {'float16_of': entry['fingerprint']}
      bundle.save_component(part, name, config, params, provenance, entry.get('priors'))


def _check_apart(destination: pathlib.Path, sources: list[epath.Path]) -> None:
  """Raises InputError where the destination is, holds or lies in a source."""
  target = os.path.realpath(destination)
  for source in map(os.path.realpath, sources):
    if os.path.commonpath([target, source]) in (target, source):
      raise InputError(
        f'{destination} overlaps with {source}, where the model comes from; choose '
        'another place'
      )


def _files_below(folder: epath.Path) -> list[epath.Path]:
  """All files below a folder, local or remote."""
  files = []
  for path in sorted(folder.iterdir()):
    files += _files_below(path) if path.is_dir() else [path]
  return files

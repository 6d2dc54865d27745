"""The index of a model folder, `bundle.json`: its components and its settings."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import os
from typing import Any

from etils import epath
import jax

from dicetalk_jax.errors import InputError, WeightsError

FORMAT = 2  # 1 has no fingerprints and no references; it is still read
INDEX = 'bundle.json'
EMOTION_MODEL = 'emo_model'

Entry = dict[str, Any]  # of a component, see `bundle`
# A path or an address. Functions that read also take an opened `ModelFolder`.
Folder = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class ModelFolder:
  """A model folder that has been opened: what is in it, without any weights.

  It shows the folder as it was then, and may be given wherever a path may.

  Attributes:
    path: local or remote.
    components: name -> entry, see `bundle`.
    settings: values that belong to the model but to no component.
  """

  path: epath.Path
  components: dict[str, Entry]
  settings: dict[str, Any]

  @classmethod
  def open(cls, folder: Folder) -> 'ModelFolder':
    """Reads the index. A folder that does not exist holds nothing.

    Raises:
      WeightsError: the index is damaged or of a newer format.
    """
    if isinstance(folder, ModelFolder):
      return folder
    path = epath.Path(folder)
    index = read_index(path)
    return cls(path, index['components'], index['settings'])

  def require(self, *names: str) -> None:
    """Checks that the components exist.

    Raises:
      WeightsError: names everything that is missing, and what there is.
    """
    if not self.components and not exists(self.path / INDEX):
      raise WeightsError(
        f'{self} is not a model folder (it has no {INDEX}); '
        'make one with python -m convert or by training'
      )
    missing = [name for name in names if name not in self.components]
    if missing:
      raise WeightsError(
        f'{self} has no {" and no ".join(missing)}; it has: '
        f'{", ".join(sorted(self.components)) or "nothing"}'
      )

  def __fspath__(self) -> str:
    return os.fspath(self.path)

  def __str__(self) -> str:
    return str(self.path)


def components(folder: Folder) -> dict[str, Entry]:
  """Returns `ModelFolder.components`."""
  return ModelFolder.open(folder).components


def settings(folder: Folder) -> dict[str, Any]:
  """Returns `ModelFolder.settings`; `dicetalk_jax.settings` has the defaults."""
  return ModelFolder.open(folder).settings


def require(folder: Folder, *names: str) -> dict[str, Entry]:
  """Calls `ModelFolder.require`, and returns the components of the folder."""
  model = ModelFolder.open(folder)
  model.require(*names)
  return model.components


def holder(folder: Folder, name: str) -> tuple[epath.Path, Entry]:
  """The model folder that has the checkpoint of a component, and the entry there.

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


def set_entries(folder: Folder, entries: Mapping[str, Entry | None]) -> None:
  """Sets entries of the index, and removes the checkpoints that they replace.

  Process 0 calls this alone.

  Args:
    folder: made if missing.
    entries: by name of the component; None removes the component.
  """
  place = epath.Path(folder)
  index = read_index(place)
  replaced = []
  for name, entry in entries.items():
    old = index['components'].pop(name, None)
    if entry is not None:
      index['components'][name] = entry
    old_checkpoint = own_checkpoint(old)
    if old_checkpoint is not None and old_checkpoint != own_checkpoint(entry):
      replaced.append(place / old_checkpoint)
  _write_index(place, index)
  for checkpoint in replaced:
    checkpoint.rmtree(missing_ok=True)


def save_settings(folder: Folder, values: Mapping[str, Any]) -> None:
  """Adds to, or changes, the settings of the folder, which is made if missing."""
  if jax.process_index() == 0:
    place = epath.Path(folder)
    index = read_index(place)
    index['settings'].update(values)
    _write_index(place, index)


def clear_settings(folder: Folder) -> None:
  """Removes all settings. Process 0 calls this alone."""
  place = epath.Path(folder)
  index = read_index(place)
  if index['settings']:
    _write_index(place, index | {'settings': {}})


def own_checkpoint(entry: Mapping[str, Any] | None) -> str | None:
  """The checkpoint that the folder of the entry has itself; None for a reference."""
  if entry is None or 'folder' in entry:
    return None
  return entry['checkpoint']


def absolute(path: epath.Path) -> epath.Path:
  """The path from anywhere; addresses (`gs://`) stay as they are."""
  return path if '://' in str(path) else path.resolve()


def read_index(folder: epath.Path) -> dict[str, Any]:
  """The content of `bundle.json`, that of an empty model if there is none."""
  path = folder / INDEX
  if not exists(path):
    return {'format': FORMAT, 'components': {}, 'settings': {}}
  try:
    index = json.loads(path.read_bytes())
    version = index['format']
    index['components'], index['settings']  # both are part of the format
  except (ValueError, KeyError, TypeError) as error:
    raise WeightsError(f'{path} is damaged; copy the model folder again') from error
  if version not in range(1, FORMAT + 1):
    raise WeightsError(
      f'{path} has format {version}, this program reads {FORMAT}; update the program'
    )
  return index | {'format': FORMAT}


def _write_index(folder: epath.Path, index: dict[str, Any]) -> None:
  """Replaces `bundle.json` in one step."""
  part = folder / f'.{INDEX}.part'
  with writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(index, indent=2, sort_keys=True) + '\n')
    part.replace(folder / INDEX)


@contextlib.contextmanager
def writing(place: epath.Path) -> Iterator[None]:
  """Turns a refusal of the operating system into InputError."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f'cannot write {place}: {error.strerror or error}; check its permissions, or '
      'choose another model folder'
    ) from error


def exists(path: epath.Path) -> bool:
  """Whether the path exists; raises WeightsError if nobody can say."""
  try:
    return path.exists()
  except Exception as error:  # each kind of storage has its own errors
    raise WeightsError(
      f'{path} cannot be reached ({first_line(error)}); check the address and your '
      'access to it'
    ) from error


def first_line(error: Exception) -> str:
  """Returns the first line of an error, which fits into a sentence."""
  return str(error).partition('\n')[0]

"""What has been read of which clip, on disk: an interrupted table resumes from there.

    journal.jsonl          what all of it was made with, then one line for each clip
    arrays/ROW/CLIP.npz    what the judges read of the clip, and its frames

A line follows its arrays, so a clip that has a line is complete.
"""

from collections.abc import Iterable, Mapping
import json
import pathlib
from typing import Any

import numpy as np

from dicetalk_jax.errors import DataError, InputError
from dicetalk_jax.files import atomic_file

Facts = dict[str, Any]  # numbers and names, as JSON has them
Arrays = dict[str, np.ndarray]


class Journal:
  """The clips of all rows that are finished. Get it with `Journal.open`.

  Attributes:
    folder: where it lies.
    made_with: fingerprints and settings that everything in it depends on.
  """

  def __init__(self, folder: pathlib.Path, made_with: Facts, lines: Iterable[Facts]):
    self.folder = folder
    self.made_with = made_with
    self._facts = {(line['row'], line['clip']): line for line in lines}

  @classmethod
  def open(
    cls, folder: pathlib.Path, made_with: Mapping[str, Any] | None = None
  ) -> 'Journal':
    """Reads a journal, or begins one where there is none.

    Args:
      folder: made if missing.
      made_with: what the caller is about to work with; None only reads.

    Raises:
      InputError: the journal was made with something else, or there is none to read.
      DataError: it is damaged.
    """
    wanted = json.loads(json.dumps(made_with))
    path = folder / 'journal.jsonl'
    if not path.exists():
      if wanted is None:
        raise InputError(
          f'{folder} has no table; make it with python -m benchmarks.demo_table'
        )
      _write(path, [wanted])
      return cls(folder, wanted, [])
    *whole, half = path.read_text().split('\n')
    try:
      found, *lines = map(json.loads, whole)
    except ValueError as error:
      raise DataError(f'{path} is damaged; delete {folder} and start again') from error
    if wanted is None:
      return cls(folder, found, lines)
    if different := _differences(found, wanted):
      raise InputError(
        f'{folder} was made with {different}; give another --output, or repeat what '
        'it was made with'
      )
    if half:  # a killed run left it
      _write(path, [found, *lines])
    return cls(folder, found, lines)

  @property
  def lines(self) -> list[Facts]:
    """The facts of all finished clips, with their `row` and `clip`."""
    return [*self._facts.values()]

  def has(self, row: str, clip: str) -> bool:
    """Whether the clip of the row is finished."""
    return (row, clip) in self._facts

  def add(self, row: str, clip: str, arrays: Arrays, **facts: Any) -> None:
    """Finishes a clip."""
    with atomic_file(self._path(row, clip)) as part, part.open('wb') as file:
      np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    line = {'row': row, 'clip': clip, **facts}
    with (self.folder / 'journal.jsonl').open('a') as file:
      file.write(json.dumps(line) + '\n')
    self._facts[row, clip] = line

  def facts(self, row: str, clip: str) -> Facts:
    """The facts of a finished clip."""
    return self._facts[row, clip]

  def arrays(self, row: str, clip: str, *names: str) -> Arrays:
    """The named arrays of a finished clip, or all.

    Raises:
      DataError: the file is missing or damaged.
    """
    path = self._path(row, clip)
    try:
      with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names or file.files}
    except (OSError, ValueError, KeyError) as error:
      raise DataError(
        f'{path} is missing or damaged; delete {self.folder} and start again'
      ) from error

  def _path(self, row: str, clip: str) -> pathlib.Path:
    return self.folder / 'arrays' / row.replace(' ', '_') / f'{clip}.npz'


def _write(path: pathlib.Path, lines: Iterable[Facts]) -> None:
  with atomic_file(path) as part:
    part.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def _differences(found: Facts, wanted: Facts) -> str:
  """Names what differs, with both values; '' if nothing does."""
  return ', '.join(
    f'{name}={found.get(name)} (now {wanted.get(name)})'
    for name in sorted(found.keys() | wanted.keys())
    if found.get(name) != wanted.get(name)
  )

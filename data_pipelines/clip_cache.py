"""Finished clips on disk, so that a killed preparation resumes where it was."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import posixpath
from typing import Any

from fsspec.implementations.local import LocalFileSystem
import numpy as np

from data_pipelines import filesystems
from data_pipelines.corpora.clip_file import UNEXPECTED, Skipped
from dicetalk_jax.files import atomic_file

_THREADS = 32  # that read files, since most of the time is waiting
_BATCH = 1000  # files given to the threads at a time; there may be millions


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The result of preparing one clip file.

  Attributes:
    keys: of its records.
    frames: of each record.
    skipped: what was left out.
    without_expression: whether a record lacks expression features.
  """

  keys: tuple[str, ...] = ()
  frames: tuple[int, ...] = ()
  skipped: tuple[Skipped, ...] = ()
  without_expression: bool = False

  @property
  def final(self) -> bool:
    """Whether another try would end in the same way: no error was unexpected."""
    return all(skip.reason != UNEXPECTED for skip in self.skipped)


class ClipCache:
  """Outcomes and records, by a name that states everything they depend on.

  A clip is done when its outcome is there, which is written last and atomically. Names
  of files are hashes, spread over 256 folders.
  """

  def __init__(self, folder: str | os.PathLike):
    """Opens a folder on a disk, or an fsspec address, that all workers share."""
    self.fs, self._root = filesystems.open_folder(folder)

  def __reduce__(self):
    return ClipCache, (filesystems.address_of(self.fs, self._root),)

  def outcome(self, name: str) -> Outcome | None:
    """Reads the outcome of a clip; None if the clip is not done."""
    return self._read(self._path(name, '.json'))

  def outcomes(self, names: Sequence[str]) -> Iterator[Outcome | None]:
    """Reads the outcomes of many clips, in their order, after one listing of files."""
    self.fs.invalidate_cache(self._root)  # other processes write
    existing = set(self.fs.find(self._root))

    def read(path: str) -> Outcome | None:
      return self._read(path) if path in existing else None

    paths = [self._path(name, '.json') for name in names]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      for first in range(0, len(paths), _BATCH):
        yield from pool.map(read, paths[first : first + _BATCH])

  def _read(self, path: str) -> Outcome | None:
    try:
      fields = json.loads(self.fs.cat_file(path))
    except (FileNotFoundError, ValueError):
      return None
    return Outcome(
      keys=tuple(fields['keys']),
      frames=tuple(fields['frames']),
      skipped=tuple(Skipped(**skip) for skip in fields['skipped']),
      without_expression=fields['without_expression'],
    )

  def store(
    self, name: str, results: Iterable[tuple[str, dict[str, Any]] | Skipped]
  ) -> Outcome:
    """Writes records one by one, and their outcome at the end."""
    keys: list[str] = []
    frames: list[int] = []
    skipped: list[Skipped] = []
    without_expression = False
    for result in results:
      if isinstance(result, Skipped):
        skipped.append(result)
        continue
      key, example = result
      self._write(self._path(name, f'-{len(keys)}.npz'), _pack(example))
      keys.append(key)
      frames.append(int(example['num_frames']))
      without_expression |= not example['has_expression']
    outcome = Outcome(tuple(keys), tuple(frames), tuple(skipped), without_expression)
    content = json.dumps(dataclasses.asdict(outcome))
    self._write(self._path(name, '.json'), content.encode())
    return outcome

  def records(
    self, name: str, outcome: Outcome
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (key, record) of a clip that is done."""
    for i, key in enumerate(outcome.keys):
      yield key, _unpack(self.fs.cat_file(self._path(name, f'-{i}.npz')))

  def write_text(self, name: str, text: str) -> str:
    """Writes a file next to the clips, and returns its path."""
    path = posixpath.join(self._root, name)
    self._write(path, text.encode())
    if isinstance(self.fs, LocalFileSystem):
      return path
    return self.fs.unstrip_protocol(path)

  def remove(self) -> None:
    """Deletes all clips."""
    self.fs.rm(self._root, recursive=True)

  def _path(self, name: str, ending: str) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()[:40]
    return posixpath.join(self._root, digest[:2], digest + ending)

  def _write(self, path: str, data: bytes) -> None:
    if isinstance(self.fs, LocalFileSystem):
      with atomic_file(path) as part:
        part.write_bytes(data)
    else:
      self.fs.pipe_file(path, data)  # object stores show whole files only


def _pack(example: Mapping[str, Any]) -> bytes:
  """Encodes a record as npz; its frames are joined to one array of bytes."""
  arrays: dict[str, Any] = {
    name: np.asarray(value) for name, value in example.items() if name != 'frames'
  }
  if 'frames' in example:
    sizes = [len(frame) for frame in example['frames']]
    arrays['frames'] = np.frombuffer(b''.join(example['frames']), np.uint8)
    arrays['frame_sizes'] = np.array(sizes, np.int64)
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def _unpack(data: bytes) -> dict[str, Any]:
  """Decodes a record; the inverse of `_pack`."""
  example: dict[str, Any] = {}
  with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
    for name in arrays.files:
      value = arrays[name]
      example[name] = value if value.ndim else value.item()
  if 'frames' in example:
    joined = example['frames'].tobytes()
    ends = np.cumsum(example.pop('frame_sizes'))
    starts = [0, *ends[:-1]]
    example['frames'] = [joined[start:end] for start, end in zip(starts, ends)]
  return example

"""Finished clips on disk, so that a killed preparation goes on where it was."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import posixpath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
import numpy as np

from data_pipelines.corpora.clip_file import UNEXPECTED, Skipped

_AT_ONCE = 32  # files that are read side by side, since most of the time is waiting


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of one clip file: keys and frames of its records, and what was left
  out.
  """

  keys: tuple[str, ...] = ()
  frames: tuple[int, ...] = ()
  skipped: tuple[Skipped, ...] = ()
  without_expression: bool = False

  @property
  def final(self) -> bool:
    """Whether another try would end alike: what was left out was so for faults of
    its own.
    """
    return all(skip.reason != UNEXPECTED for skip in self.skipped)


class ClipCache:
  """Outcomes and records by a name that says everything they depend on.

  A clip is done when its outcome is there, which is written last and whole. Names of
  files are hashes, spread over 256 folders.

  Args:
    folder: on a disk or an fsspec address; shared by all who work.
  """

  def __init__(self, folder: str | os.PathLike):
    self.fs, self._root = fsspec.core.url_to_fs(os.fspath(folder))

  def __reduce__(self):
    return ClipCache, (
      self.fs.unstrip_protocol(self._root),
    )  # whole, for workers in another folder

  def outcome(self, name: str) -> Outcome | None:
    """None where the clip is not done."""
    return self._read(self._path(name, '.json'))

  def outcomes(self, names: Sequence[str]) -> Iterator[Outcome | None]:
    """Those of many clips, in their order, after one listing that tells which are
    there.
    """
    self.fs.invalidate_cache(self._root)  # other processes write
    there = set(self.fs.find(self._root))
    paths = [self._path(name, '.json') for name in names]
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
      for i in range(0, len(paths), 1000):  # a pool would take all of a million at once
        yield from pool.map(
          lambda path: self._read(path) if path in there else None, paths[i : i + 1000]
        )

  def _read(self, path: str) -> Outcome | None:
    try:
      fields = json.loads(self.fs.cat_file(path))
    except (FileNotFoundError, ValueError):
      return None
    return Outcome(
      tuple(fields['keys']),
      tuple(fields['frames']),
      tuple(Skipped(**s) for s in fields['skipped']),
      fields['without_expression'],
    )

  def store(
    self, name: str, results: Iterable[tuple[str, dict[str, Any]] | Skipped]
  ) -> Outcome:
    """Writes records as they come, and their outcome at the end."""
    keys, frames, skipped, without = [], [], [], False
    for result in results:
      if isinstance(result, Skipped):
        skipped.append(result)
        continue
      key, example = result
      self._write(self._path(name, f'-{len(keys)}.npz'), _pack(example))
      keys.append(key)
      frames.append(int(example['num_frames']))
      without |= not example['has_expression']
    outcome = Outcome(tuple(keys), tuple(frames), tuple(skipped), without)
    self._write(
      self._path(name, '.json'), json.dumps(dataclasses.asdict(outcome)).encode()
    )
    return outcome

  def records(
    self, name: str, outcome: Outcome
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, record) of a clip that is done."""
    for i, key in enumerate(outcome.keys):
      yield key, _unpack(self.fs.cat_file(self._path(name, f'-{i}.npz')))

  def write_text(self, name: str, text: str) -> str:
    """A file beside the clips; returns its path."""
    path = posixpath.join(self._root, name)
    self._write(path, text.encode())
    return (
      path if isinstance(self.fs, LocalFileSystem) else self.fs.unstrip_protocol(path)
    )

  def remove(self):
    self.fs.rm(self._root, recursive=True)

  def _path(self, name: str, ending: str) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()[:40]
    return posixpath.join(self._root, digest[:2], digest + ending)

  def _write(self, path: str, data: bytes):
    if not isinstance(self.fs, LocalFileSystem):
      self.fs.pipe_file(path, data)  # object stores show whole files only
      return
    part = f'{path}.{os.getpid()}.part'
    self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
    self.fs.pipe_file(part, data)
    self.fs.mv(part, path)


def _pack(example: Mapping[str, Any]) -> bytes:
  """A record as npz; pictures are joined to one array of bytes."""
  arrays = {
    name: np.asarray(value) for name, value in example.items() if name != 'frames'
  }
  if 'frames' in example:
    arrays['frames'] = np.frombuffer(b''.join(example['frames']), np.uint8)
    arrays['frame_sizes'] = np.array(
      [len(frame) for frame in example['frames']], np.int64
    )
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def _unpack(data: bytes) -> dict[str, Any]:
  with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
    example = {name: arrays[name] for name in arrays.files}
  if 'frames' in example:
    pixels, ends = example['frames'].tobytes(), np.cumsum(example.pop('frame_sizes'))
    example['frames'] = [pixels[a:b] for a, b in zip([0, *ends], ends)]
  return {
    name: value.item() if isinstance(value, np.ndarray) and not value.ndim else value
    for name, value in example.items()
  }

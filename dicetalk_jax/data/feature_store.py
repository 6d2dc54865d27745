"""What frozen networks say about each clip, computed once and kept beside the data.

VAE latents, CLIP tokens, Whisper states and emotion statistics are arrays `[n, ...]`
per clip, read through memory maps: a loader reads just the rows of its window. A
feature belongs to one data set and one network, both named by a fingerprint; when
either changes, another folder is used.

    <folder>/<data set>/<name>-<network>/     every clip is there
    <folder>/<data set>/.<name>-<network>/    being computed
      <writer>.npy      the rows of its clips, one after another
      <writer>.clips    int64 pairs (clip, number of rows); a clip is stored when its pair is and its rows are

Each run of each process writes files of its own, so no file ever has two writers, and
what a killed run has finished stays, but for clips that came within a second of the one
before. Pairs follow when their rows are on the disk; should the end of a file be lost
all the same, its clips count as missing. Readers see the files of a folder as one.
"""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import math
import os
import pathlib
import time
from typing import Any, BinaryIO
import uuid

import numpy as np

from dicetalk_jax.errors import DataError

Item = tuple[int, np.ndarray]  # clip and its rows
# seconds between syncs with the disk: one for each of many short clips could take most
# of the time
SYNC_EVERY = 1.0


class Feature:
  """One feature: `feature(clip, rows)` reads the rows of one clip. Picklable.

  Args:
    folder: of its files.
    part: whether it is still being computed, so that clips whose rows were lost may be
      missing.

  Attributes:
    lengths: int64, rows by clip; -1 where a clip is not there.

  Raises:
    DataError: the folder holds nothing that can be read, or not all that it lists.
  """

  def __init__(self, folder: str | os.PathLike, part: bool = False):
    self.folder, self.part = pathlib.Path(folder), part
    self._files: list[np.ndarray] = []
    places, listed = [], []  # of each clip: file, first row, clip, number of rows
    try:
      for path in sorted(self.folder.glob('*.clips')):
        pairs = _stored(path)
        listed.append(pairs[:, 0])
        clips, lengths = pairs[: _held(path, pairs)].T
        if len(clips):
          file, first = (
            np.full_like(clips, len(self._files)),
            lengths.cumsum() - lengths,
          )
          places.append(np.stack([file, first, clips, lengths], axis=1))
          self._files.append(_map(_rows_of(path), int(lengths.sum())))
    except (OSError, ValueError) as error:
      raise DataError(
        f'{self.folder} is damaged ({error}); delete it to compute the feature anew'
      ) from error
    if not any(map(len, places if part else listed)):
      raise DataError(
        f'{self.folder} holds no clips; delete it to compute the feature anew'
      )
    table = np.concatenate([np.zeros((0, 4), np.int64), *places])
    self._places = np.full((max(clips.max(initial=-1) for clips in listed) + 1, 3), -1)
    self._places[table[:, 2]] = table[:, [0, 1, 3]]
    self.lengths = self._places[:, 2]
    lost = np.unique(np.concatenate(listed))
    lost = lost[self.lengths[lost] < 0]
    if len(lost) and not part:
      raise DataError(
        f'{self.folder} is damaged (the rows of {len(lost)} clips, such as {lost[0]}, '
        'are lost); delete it to compute the feature anew'
      )

  def __reduce__(self):
    return Feature, (self.folder, self.part)

  def __len__(self) -> int:
    """Number of clips."""
    return int((self.lengths >= 0).sum())

  def length(self, clip: int) -> int:
    """Number of rows of one clip.

    Raises:
      DataError: the feature was not computed for this clip.
    """
    if not 0 <= clip < len(self.lengths) or self.lengths[clip] < 0:
      raise DataError(
        f'{self.folder.name} has no clip {clip}; delete {self.folder} to compute the '
        'feature anew'
      )
    return int(self.lengths[clip])

  def __call__(self, clip: int, rows: slice = slice(None)) -> np.ndarray:
    """Rows of one clip, `[n, ...]`, read from disk."""
    start, stop, step = rows.indices(self.length(clip))
    file, offset, _ = self._places[clip]
    return np.array(self._files[file][offset + start : offset + stop : step])


class FeatureStore:
  """The features of one data set.

  Args:
    folder: root of all features, on a local or mounted disk (memory maps cannot read
      `gs://`); where several processes compute, on a disk that they share.
    dataset: fingerprint of the data set and split, `ClipSource.fingerprint`.
  """

  def __init__(self, folder: str | os.PathLike, dataset: str):
    self.folder = pathlib.Path(folder) / dataset

  def _paths(self, name: str, component: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Folders of the feature: complete, and being computed."""
    return self.folder / f'{name}-{component}', self.folder / f'.{name}-{component}'

  def complete(self, name: str, component: str) -> bool:
    """Whether `read` would find the feature.

    Raises:
      DataError: it is there, but cannot be read.
    """
    path, _ = self._paths(name, component)
    return path.is_dir() and len(Feature(path)) > 0

  def read(self, name: str, component: str) -> Feature:
    """Opens a feature.

    Raises:
      DataError: it has not been computed, or not for all clips.
    """
    path, part = self._paths(name, component)
    if not path.is_dir():
      state = 'incomplete' if part.is_dir() else 'missing'
      raise DataError(
        f'{path} is {state}; compute the feature {name} of this data set first'
      )
    return Feature(path)

  def read_part(self, name: str, component: str) -> Feature:
    """Opens what has been computed so far.

    Raises:
      DataError: no clip has been computed yet.
    """
    path, part = self._paths(name, component)
    with contextlib.suppress(
      DataError
    ):  # not there, or completed by another process at this moment
      return Feature(part, part=True)
    return Feature(path)

  def write(self, name: str, component: str, items: Iterable[Item]) -> Feature:
    """Stores a whole feature and opens it; a complete one is opened as it is and
    `items` is not touched.

    Args:
      name: 'latents', 'clip_embed', 'whisper', 'prior', ...
      component: fingerprint of the network and its settings.
      items: (clip, array `[n, ...]`) of all clips in any order; all arrays have the
        same dtype and row shape. A generator is consumed one clip at a time, so that
        nothing is held in memory. Clips that an interrupted run has stored are passed
        over.

    Raises:
      DataError: arrays differ in row shape or dtype, a clip comes twice, or there is
        none.
    """
    path, part = self._paths(name, component)
    if not path.is_dir():
      part.mkdir(parents=True, exist_ok=True)
      done = _done(part)
      _append(part, name, (item for item in items if item[0] not in done))
      if not self._finish(name, component, clips=1):
        raise DataError(f'feature {name}: there are no clips to store')
    return Feature(path)

  def fill(
    self,
    name: str,
    component: str,
    clips: int,
    compute: Callable[[list[int]], Iterable[Item]],
    shard: tuple[int, int] = (0, 1),
  ) -> bool:
    """Computes what is missing of one process's share of a feature.

    Args:
      name, component: see `write`.
      clips: number of clips of the data set.
      compute: from the clips that are missing to their (clip, array), in any order; not
        called if there are none.
      shard: (index, count): every `count`-th clip belongs to this process.

    Returns:
      Whether the feature is now complete; if not, it will be when the other processes
      are done.

    Raises:
      DataError: see `write`; or the complete feature cannot be read.
    """
    if self.complete(name, component):
      return True
    part = self._paths(name, component)[1]
    part.mkdir(parents=True, exist_ok=True)
    if todo := sorted(set(range(clips)[shard[0] :: shard[1]]) - _done(part)):
      _append(part, name, compute(todo))
    return self._finish(name, component, clips)

  def wait(
    self, name: str, component: str, clips: int, patience: float = 600.0
  ) -> Feature:
    """Opens a feature when all processes have done their share.

    Args:
      name, component, clips: see `fill`.
      patience: seconds without a new clip after which to give up.

    Raises:
      DataError: nobody adds clips any more.
    """
    part, seen, since = self._paths(name, component)[1], -1, 0.0
    while not self._finish(name, component, clips):
      if (stored := len(_done(part))) > seen:
        seen, since = stored, time.monotonic()
      if time.monotonic() - since > patience:
        raise DataError(
          f'{part} has {seen} of {clips} clips, and no process has added one for '
          f'{patience:.0f} s; start all processes, with features on a disk that they '
          'share'
        )
      time.sleep(min(1.0, patience))
    return self.read(name, component)

  def _finish(self, name: str, component: str, clips: int) -> bool:
    """Gives a feature of all clips its name; whether it has it.

    Any process may be the one to do so.
    """
    path, part = self._paths(name, component)
    if not path.is_dir() and len(_done(part)) >= clips:
      with contextlib.suppress(OSError):  # another process was faster
        os.replace(part, path)
    return path.is_dir()


def _rows_of(clips: pathlib.Path) -> pathlib.Path:
  return clips.with_suffix('.npy')


def _stored(path: pathlib.Path) -> np.ndarray:
  """The (clip, rows) pairs `[n, 2]` of one writer; a torn last pair is left out."""
  whole = path.read_bytes()
  return np.frombuffer(whole[: len(whole) // 16 * 16], np.int64).reshape(-1, 2)


def _held(path: pathlib.Path, pairs: np.ndarray) -> int:
  """How many of a writer's pairs have their rows in its data file: a power cut may
  have taken the end of it.
  """
  try:
    with open(
      _rows_of(path), 'rb'
    ) as file:  # opening asks network disks for the size anew
      shape, dtype = _read_header(file)
      room = os.fstat(file.fileno()).st_size - file.tell()
  except (FileNotFoundError, ValueError):  # not even a header
    return 0
  return int((pairs[:, 1].cumsum() * math.prod(shape) * dtype.itemsize <= room).sum())


def _done(part: pathlib.Path) -> set[int]:
  """The clips that any writer has stored."""
  done: set[int] = set()
  for path in part.glob('*.clips'):
    with contextlib.suppress(FileNotFoundError):  # the feature was completed meanwhile
      pairs = _stored(path)
      done |= set(pairs[: _held(path, pairs), 0].tolist())
  return done


def _map(path: pathlib.Path, rows: int) -> np.ndarray:
  """The first `rows` rows; a killed writer has left a header that counts none."""
  with open(path, 'rb') as file:
    shape, dtype = _read_header(file)
    return np.memmap(path, dtype, 'r', file.tell(), (rows, *shape))


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
  """Shape and type of a row."""
  np.lib.format.read_magic(file)
  shape, _, dtype = np.lib.format.read_array_header_1_0(file)
  return shape[1:], dtype


def _append(folder: pathlib.Path, name: str, items: Iterable[Item]) -> None:
  """Writes items into two new files. What was written before an error is stored."""
  path = folder / f'{uuid.uuid4().hex}.clips'
  stored: set[int] = set()
  total, rows, pairs, synced = 0, None, [], -math.inf
  with contextlib.ExitStack() as stack:

    def sync():  # rows before their pairs
      data.flush()
      os.fsync(data.fileno())
      clips.write(np.array(pairs, np.int64).tobytes())
      os.fsync(clips.fileno())
      pairs.clear()

    for clip, array in items:
      array = np.asarray(array, order='C')
      if clip in stored:
        raise DataError(f'feature {name}: clip {clip} comes twice')
      if rows is None:
        rows = array.dtype, array.shape[1:]
        data = stack.enter_context(open(_rows_of(path), 'xb'))
        _write_header(data, 0, *rows)
        clips = stack.enter_context(open(path, 'xb', buffering=0))
        stack.callback(sync)
      if (array.dtype, array.shape[1:]) != rows:
        raise DataError(
          f'feature {name}: rows of clip {clip} are {array.dtype} {array.shape[1:]}, '
          f'others {rows}'
        )
      data.write(array.data)
      pairs.append((clip, len(array)))
      stored.add(clip)
      total += len(array)
      if time.monotonic() - synced > SYNC_EVERY:
        sync()
        synced = time.monotonic()
    if rows is not None:  # for other readers of .npy files
      data.seek(0)
      _write_header(data, total, *rows)


def _write_header(
  file: BinaryIO, total: int, dtype: np.dtype, shape: Sequence[Any]
) -> None:
  """NumPy leaves room in the header for the first axis to grow, so writing it again
  keeps its length.
  """
  np.lib.format.write_array_header_1_0(
    file,
    {
      'descr': np.lib.format.dtype_to_descr(dtype),
      'fortran_order': False,
      'shape': (total, *shape),
    },
  )

"""The outputs of frozen networks for each clip, computed once and stored with the data.

VAE latents, CLIP tokens, Whisper states and emotion statistics are arrays `[n, ...]`
per clip, read through memory maps: a loader reads just the rows of its window. A
feature belongs to one data set and one network, both named by a fingerprint; when
either changes, another folder is used.

    <folder>/<data set>/<name>-<network>/     every clip is there
    <folder>/<data set>/.<name>-<network>/    being computed
      <shard>.npy      the rows of up to 256 clips, one after another
      <shard>.clips    int64 pairs (clip, number of rows)

Both files of a shard are renamed when they are whole, the pairs last. So processes and
runs never share a file, and a killed run loses at most the shard that it was writing. A
shard whose rows are cut off, by a power cut or a full disk, does not count, and its
clips are computed again.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import itertools
import os
import pathlib
import time
from typing import BinaryIO, NamedTuple
import uuid

import numpy as np

from dicetalk_jax.errors import DataError
from dicetalk_jax.files import atomic_file

SHARD_CLIPS = 256

Item = tuple[int, np.ndarray]  # clip and its rows


class Feature:
  """One feature: `feature(clip, rows)` reads the rows of one clip. Picklable.

  Args:
    folder: of its shards.
    incomplete: whether it is still being computed, so that clips may be missing.

  Attributes:
    lengths: int64, rows by clip; -1 where a clip is missing.

  Raises:
    DataError: the folder holds no shard, or not all rows of the clips that it lists.
  """

  def __init__(self, folder: str | os.PathLike, incomplete: bool = False):
    self.folder = pathlib.Path(folder)
    self.incomplete = incomplete
    try:
      shards = [_open_shard(path) for path in sorted(self.folder.glob('*.clips'))]
    except OSError as error:
      raise DataError(
        f'{self.folder} cannot be read ({error}); delete it to compute the feature '
        'again'
      ) from error
    whole = [shard for shard in shards if shard.rows is not None]
    if not any(len(shard.clips) for shard in (whole if incomplete else shards)):
      raise DataError(
        f'{self.folder} holds no clips; delete it to compute the feature again'
      )

    # Where the rows of each clip are.
    listed = np.unique(np.concatenate([shard.clips for shard in shards]))
    size = int(listed[-1]) + 1
    self.lengths = np.full(size, -1)
    self._shard = np.zeros(size, int)
    self._first_row = np.zeros(size, int)
    self._rows = [shard.rows for shard in whole]
    for i, shard in enumerate(whole):
      self.lengths[shard.clips] = shard.lengths
      self._shard[shard.clips] = i
      self._first_row[shard.clips] = shard.lengths.cumsum() - shard.lengths

    lost = listed[self.lengths[listed] < 0]
    if len(lost) and not incomplete:
      raise DataError(
        f'{self.folder} is damaged (the rows of {len(lost)} clips, such as {lost[0]}, '
        'are lost); delete it to compute the feature again'
      )

  def __reduce__(self):
    return Feature, (self.folder, self.incomplete)

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
        'feature again'
      )
    return int(self.lengths[clip])

  def __call__(self, clip: int, rows: slice = slice(None)) -> np.ndarray:
    """Rows of one clip, `[n, ...]`, read from disk."""
    start, stop, step = rows.indices(self.length(clip))
    first = self._first_row[clip]
    return np.array(self._rows[self._shard[clip]][first + start : first + stop : step])


class FeatureStore:
  """The features of one data set.

  Args:
    folder: root of all features, on a local or mounted disk (memory maps cannot read
      `gs://`); where several processes compute, on a disk that they share.
    dataset: fingerprint of the data set and split, `ClipSource.fingerprint`.
  """

  def __init__(self, folder: str | os.PathLike, dataset: str):
    self.folder = pathlib.Path(folder) / dataset

  def _complete_folder(self, name: str, component: str) -> pathlib.Path:
    return self.folder / f'{name}-{component}'

  def _incomplete_folder(self, name: str, component: str) -> pathlib.Path:
    return self.folder / f'.{name}-{component}'

  def complete(self, name: str, component: str) -> bool:
    """Whether `read` would find the feature.

    Raises:
      DataError: it is there, but cannot be read.
    """
    folder = self._complete_folder(name, component)
    return folder.is_dir() and len(Feature(folder)) > 0

  def read(self, name: str, component: str) -> Feature:
    """Opens a feature.

    Raises:
      DataError: it has not been computed, or not for all clips.
    """
    folder = self._complete_folder(name, component)
    if not folder.is_dir():
      begun = self._incomplete_folder(name, component).is_dir()
      raise DataError(
        f'{folder} is {"incomplete" if begun else "missing"}; compute the feature '
        f'{name} of this data set first'
      )
    return Feature(folder)

  def read_part(self, name: str, component: str) -> Feature:
    """Opens what has been computed so far.

    Raises:
      DataError: no clip has been computed yet.
    """
    with contextlib.suppress(DataError):  # another process may complete it just now
      return Feature(self._incomplete_folder(name, component), incomplete=True)
    return Feature(self._complete_folder(name, component))

  def write(self, name: str, component: str, items: Iterable[Item]) -> Feature:
    """Stores a whole feature and opens it.

    A complete one is opened as it is, and `items` is not touched.

    Args:
      name: 'latents', 'clip_embed', 'whisper', 'prior', ...
      component: fingerprint of the network and its settings.
      items: (clip, array `[n, ...]`) of all clips in any order; all arrays have the
        same dtype and row shape. A generator is consumed one clip at a time, so that
        nothing is held in memory. Clips that an interrupted run has stored are skipped.

    Raises:
      DataError: arrays differ in row shape or dtype, a clip comes twice, or there is
        none.
    """
    if not self._complete_folder(name, component).is_dir():
      folder = self._incomplete_folder(name, component)
      folder.mkdir(parents=True, exist_ok=True)
      done = _stored_clips(folder)
      _write_shards(folder, name, (item for item in items if item[0] not in done))
      if not self._finish(name, component, clips=1):
        raise DataError(f'feature {name}: there are no clips to store')
    return Feature(self._complete_folder(name, component))

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
    folder = self._incomplete_folder(name, component)
    folder.mkdir(parents=True, exist_ok=True)
    index, count = shard
    mine = set(range(index, clips, count))
    if missing := sorted(mine - _stored_clips(folder)):
      _write_shards(folder, name, compute(missing))
    return self._finish(name, component, clips)

  def wait(
    self, name: str, component: str, clips: int, patience: float = 600.0
  ) -> Feature:
    """Opens a feature when all processes have computed their share.

    Args:
      name, component, clips: see `fill`.
      patience: seconds without a new shard after which to give up.

    Raises:
      DataError: no process adds clips any more.
    """
    folder = self._incomplete_folder(name, component)
    seen, since = -1, 0.0
    while not self._finish(name, component, clips):
      if (stored := len(_stored_clips(folder))) > seen:
        seen, since = stored, time.monotonic()
      if time.monotonic() - since > patience:
        raise DataError(
          f'{folder} has {seen} of {clips} clips, and no process has added one for '
          f'{patience:.0f} s; start all processes, with features on a disk that they '
          'share'
        )
      time.sleep(min(1.0, patience))
    return self.read(name, component)

  def _finish(self, name: str, component: str, clips: int) -> bool:
    """Renames the folder if it has all clips; returns whether the feature is complete.

    Any process may be the one to do so.
    """
    complete = self._complete_folder(name, component)
    incomplete = self._incomplete_folder(name, component)
    if not complete.is_dir() and len(_stored_clips(incomplete)) >= clips:
      for left_by_killed_run in incomplete.glob('.*.part'):
        left_by_killed_run.unlink(missing_ok=True)
      with contextlib.suppress(OSError):  # another process was faster
        os.replace(incomplete, complete)
    return complete.is_dir()


class _Shard(NamedTuple):
  clips: np.ndarray  # int64 [n]
  lengths: np.ndarray  # int64 [n], rows of each clip
  rows: np.ndarray | None  # memory map of all rows; None if some are lost


def _open_shard(path: pathlib.Path) -> _Shard:
  """Opens a shard by the path of its pairs."""
  numbers = np.fromfile(path, np.int64)
  clips, lengths = numbers[: len(numbers) // 2 * 2].reshape(-1, 2).T
  try:
    with open(path.with_suffix('.npy'), 'rb') as file:
      np.lib.format.read_magic(file)
      (_, *row_shape), _, dtype = np.lib.format.read_array_header_1_0(file)
      shape = (int(lengths.sum()), *row_shape)
      # The pairs give the number of rows: killed runs of earlier versions left headers
      # that count none.
      rows = np.memmap(file, dtype, 'r', file.tell(), shape)
  except (FileNotFoundError, ValueError):  # no rows, no header, or too few rows
    return _Shard(clips, lengths, None)
  return _Shard(clips, lengths, rows)


def _stored_clips(folder: pathlib.Path) -> set[int]:
  """The clips of all whole shards."""
  stored: set[int] = set()
  for path in folder.glob('*.clips'):
    with contextlib.suppress(FileNotFoundError):  # the feature was just completed
      shard = _open_shard(path)
      if shard.rows is not None:
        stored.update(shard.clips.tolist())
  return stored


def _write_shards(folder: pathlib.Path, name: str, items: Iterable[Item]) -> None:
  """Writes items into new shards of a folder.

  Stops early if another process completes the feature, which renames the folder.
  """
  rest = _checked(name, items)
  for first in rest:
    shard = itertools.chain([first], itertools.islice(rest, SHARD_CLIPS - 1))
    try:
      if folder.is_dir():
        _write_shard(folder / uuid.uuid4().hex, shard)
    except FileNotFoundError:
      if folder.is_dir():
        raise
    if not folder.is_dir():
      return


def _checked(name: str, items: Iterable[Item]) -> Iterator[Item]:
  """Contiguous arrays of one dtype and row shape, each clip once."""
  stored: set[int] = set()
  kind = None
  for clip, array in items:
    array = np.asarray(array, order='C')
    if clip in stored:
      raise DataError(f'feature {name}: clip {clip} comes twice')
    own_kind = array.dtype, array.shape[1:]
    kind = kind or own_kind
    if own_kind != kind:
      raise DataError(
        f'feature {name}: rows of clip {clip} are {array.dtype} {array.shape[1:]}, '
        f'others {kind}'
      )
    stored.add(clip)
    yield clip, array


def _write_shard(stem: pathlib.Path, items: Iterable[Item]) -> None:
  """Writes `<stem>.npy` and then `<stem>.clips`."""
  pairs: list[tuple[int, int]] = []
  with (
    atomic_file(stem.with_suffix('.npy')) as part,
    open(part, 'wb') as file,
  ):
    for clip, array in items:
      if not pairs:
        _write_header(file, 0, array)
      file.write(array.data)
      pairs.append((clip, len(array)))
    file.seek(0)
    _write_header(file, sum(length for _, length in pairs), array)
    file.flush()
    os.fsync(file.fileno())  # rows are on the disk before their pairs
  with atomic_file(stem.with_suffix('.clips')) as part:
    np.array(pairs, np.int64).tofile(part)


def _write_header(file: BinaryIO, count: int, rows: np.ndarray) -> None:
  """The header of `count` rows like these.

  NumPy leaves room for the first axis to grow, so writing it again keeps its length.
  """
  header = np.lib.format.header_data_from_array_1_0(rows)
  header['shape'] = (count, *rows.shape[1:])
  np.lib.format.write_array_header_1_0(file, header)

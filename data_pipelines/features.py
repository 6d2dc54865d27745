"""What frozen networks say about each clip, computed once and kept beside the data.

VAE latents, CLIP tokens, Whisper states and emotion statistics are arrays `[n, ...]` per clip. All clips of one
feature share one `data.npy`, opened as a memory map: a loader reads just the rows of its window. A feature belongs to
one data set and one network, both named by a fingerprint; when either changes, another folder is used.

    <folder>/<data set>/<name>-<network>/data.npy, index.npz
"""

from collections.abc import Iterable
import os
import pathlib
import shutil
import tempfile
from typing import Any, BinaryIO

import numpy as np

from dicetalk_jax.errors import DataError


class Feature:
  """One complete feature: `feature(clip, rows)` reads the rows of one clip. Picklable."""

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)
    with np.load(self.folder / 'index.npz', allow_pickle=False) as index:
      self.starts, self.lengths = index['starts'], index['lengths']  # by clip; length -1: not there
    self.data = np.load(self.folder / 'data.npy', mmap_mode='r', allow_pickle=False)

  def __reduce__(self):
    return Feature, (self.folder,)

  def __len__(self) -> int:
    """Number of clips."""
    return int((self.lengths >= 0).sum())

  def length(self, clip: int) -> int:
    """Number of rows of one clip.

    Raises:
      DataError: the feature was not computed for this clip.
    """
    if not 0 <= clip < len(self.lengths) or self.lengths[clip] < 0:
      raise DataError(f'{self.folder.name} has no clip {clip}; delete {self.folder} to compute the feature anew')
    return int(self.lengths[clip])

  def __call__(self, clip: int, rows: slice = slice(None)) -> np.ndarray:
    """Rows of one clip, `[n, ...]`, read from disk."""
    start, stop, step = rows.indices(self.length(clip))
    offset = int(self.starts[clip])
    return np.array(self.data[offset + start:offset + stop:step])


class FeatureStore:
  """The features of one data set.

  Args:
    folder: root of all features, on a local or mounted disk (memory maps cannot read `gs://`).
    dataset: fingerprint of the data set and split, `ClipSource.fingerprint`.
  """

  def __init__(self, folder: str | os.PathLike, dataset: str):
    self.folder = pathlib.Path(folder) / dataset

  def _path(self, name: str, component: str) -> pathlib.Path:
    return self.folder / f'{name}-{component}'

  def complete(self, name: str, component: str) -> bool:
    """Whether `read` would find the feature."""
    return self._path(name, component).is_dir()

  def read(self, name: str, component: str) -> Feature:
    """Opens a feature.

    Raises:
      DataError: it has not been computed.
    """
    if not self.complete(name, component):
      raise DataError(f'{self._path(name, component)} is missing; compute the feature {name} of this data set first')
    return Feature(self._path(name, component))

  def write(self, name: str, component: str, items: Iterable[tuple[int, np.ndarray]]) -> Feature:
    """Stores a feature and opens it; a complete one is opened as it is and `items` is not touched.

    Args:
      name: 'latents', 'clip_embed', 'whisper', 'prior', ...
      component: fingerprint of the network and its settings.
      items: (clip, array `[n, ...]`) in any order; all arrays have the same dtype and row shape. A generator is
        consumed one clip at a time, so that nothing is held in memory.

    Raises:
      DataError: arrays differ in row shape or dtype, a clip comes twice, or there is none.
    """
    path = self._path(name, component)
    if path.is_dir():
      return Feature(path)
    self.folder.mkdir(parents=True, exist_ok=True)
    # Only a whole feature gets its name; what a killed run left behind is ignored.
    aside = pathlib.Path(tempfile.mkdtemp(prefix=f'.{path.name}-', dir=self.folder))
    try:
      with open(aside / 'data.npy', 'wb') as file:
        spans = _append_all(file, name, items)
      size = max(spans) + 1
      starts, lengths = np.zeros(size, np.int64), np.full(size, -1, np.int64)
      for clip, (start, length) in spans.items():
        starts[clip], lengths[clip] = start, length
      np.savez(aside / 'index.npz', starts=starts, lengths=lengths)
      aside.chmod(0o755)
      try:
        os.replace(aside, path)
      except OSError:
        if not path.is_dir():  # another run finished the same feature first: use that
          raise
    finally:
      shutil.rmtree(aside, ignore_errors=True)
    return Feature(path)


def _append_all(file: BinaryIO, name: str, items: Iterable[tuple[int, np.ndarray]]) -> dict[int, tuple[int, int]]:
  """Writes the arrays one after another as one .npy file; returns clip -> (first row, number of rows)."""
  spans: dict[int, tuple[int, int]] = {}
  total, rows = 0, None
  for clip, array in items:
    array = np.asarray(array, order='C')
    if clip in spans:
      raise DataError(f'feature {name}: clip {clip} comes twice')
    if rows is None:
      rows = (array.dtype, array.shape[1:])
      _write_header(file, 0, *rows)
    if (array.dtype, array.shape[1:]) != rows:
      raise DataError(f'feature {name}: rows of clip {clip} are {array.dtype} {array.shape[1:]}, others {rows}')
    file.write(array.data)
    spans[clip] = total, len(array)
    total += len(array)
  if rows is None:
    raise DataError(f'feature {name}: there are no clips to store')
  file.seek(0)
  _write_header(file, total, *rows)
  return spans


def _write_header(file: BinaryIO, total: int, dtype: np.dtype, shape: tuple[Any, ...]):
  """NumPy leaves room in the header for the first axis to grow, so writing it again keeps its length."""
  np.lib.format.write_array_header_1_0(file, {
      'descr': np.lib.format.dtype_to_descr(dtype), 'fortran_order': False, 'shape': (total, *shape)})

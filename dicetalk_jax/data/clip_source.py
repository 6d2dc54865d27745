"""Random access to the clips of a prepared data set, and a table of their labels."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any, Self

import numpy as np

from dicetalk_jax.data import clip_record
from dicetalk_jax.errors import DataError
from dicetalk_jax.files import atomic_file, printable, walk


@dataclasses.dataclass(frozen=True, eq=False)
class ClipTable:
  """One row per clip: what loaders must know before they read a record.

  All fields have length `n`.
  """

  clip_id: np.ndarray
  video_id: np.ndarray
  identity: np.ndarray
  dataset: np.ndarray  # index in clip_record.DATASETS
  emotion: np.ndarray  # name, clip_record.UNKNOWN where there is no label
  intensity: np.ndarray
  num_frames: np.ndarray
  motion_head: np.ndarray
  motion_exp: np.ndarray

  def __len__(self) -> int:
    return len(self.clip_id)

  @classmethod
  def scan(cls, records: Iterable[Mapping[str, Any]]) -> Self:
    """Reads the rows from the records."""
    columns: dict[str, list] = {field.name: [] for field in dataclasses.fields(cls)}
    for record in records:
      for name, column in columns.items():
        if name in ('clip_id', 'video_id', 'identity'):
          column.append(clip_record.decode_text(record, name))
        elif name == 'emotion':
          column.append(clip_record.decode_emotion(record))
        else:
          column.append(record[name])
    return cls(**{name: np.array(column) for name, column in columns.items()})

  def save(self, path: pathlib.Path) -> None:
    """Writes the table as `.npz`, which appears when it is whole."""
    columns = {
      field.name: getattr(self, field.name) for field in dataclasses.fields(self)
    }
    with atomic_file(path) as part, open(part, 'wb') as file:
      np.savez(file, **columns)

  @classmethod
  def load(cls, path: pathlib.Path) -> Self:
    """Reads a table that `save` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
      return cls(**arrays)


class ClipSource:
  """One split of a prepared data set: `source[i]` is a record, `source.table` describes
  all.

  Picklable, so that Grain's worker processes can open it again.

  Args:
    folder: the builder directory that `prepare` returned (it holds
      `dataset_info.json`).
    split: 'train', 'val' or 'test'.

  Raises:
    DataError: the folder holds no data set, or the data set no such split.
  """

  def __init__(self, folder: str | os.PathLike, split: str = 'train'):
    self.folder = pathlib.Path(folder)
    self.split = split
    if not (self.folder / 'dataset_info.json').exists():
      raise DataError(
        f'{folder} holds no prepared data set; make one with python -m '
        'data_pipelines.prepare'
      )
    if printable(self.folder.absolute()) != str(self.folder.absolute()):
      raise DataError(
        f'{folder} has a name that is not UTF-8, from which records cannot be read; '
        'rename it'
      )
    if split not in self._builder.info.splits:
      raise DataError(
        f'{folder} has no split {split!r}; it has '
        f'{", ".join(self._builder.info.splits)}'
      )

  def __getstate__(self) -> dict[str, Any]:
    return {'folder': self.folder, 'split': self.split}

  @functools.cached_property
  def _builder(self) -> Any:
    # The import takes seconds, and worker processes open sources too.
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(self.folder)

  @functools.cached_property
  def _records(self) -> Any:
    return self._builder.as_data_source(self.split)

  def __len__(self) -> int:
    return self._builder.info.splits[self.split].num_examples

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._records[i]

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return (self[i] for i in range(len(self)))

  def __repr__(self) -> str:
    return f'{type(self).__name__}({str(self.folder)!r}, {self.split!r})'

  @functools.cached_property
  def table(self) -> ClipTable:
    """Read from the folder of the records; made by one pass over them the first
    time.
    """
    path = self.folder / f'clips-{self.split}.npz'
    if path.exists():
      return ClipTable.load(path)
    table = ClipTable.scan(self)
    if os.access(self.folder, os.W_OK):
      table.save(path)
    return table

  @functools.cached_property
  def motion_medians(self) -> tuple[float, float]:
    """Median head and expression motion of the training clips: the unit of the motion
    buckets.

    Clips without boxes or expressions have motion 0, and do not count. 0 if no clip
    counts.
    """
    splits = self._builder.info.splits
    source = self
    if self.split != 'train' and 'train' in splits:
      source = ClipSource(self.folder, 'train')
    table = source.table
    return _median_above_zero(table.motion_head), _median_above_zero(table.motion_exp)

  @functools.cached_property
  def expression_dim(self) -> int:
    """Expression coefficients per frame; 0 if no clip has any."""
    if not self.table.motion_exp.any():
      return 0  # though records without rows have a width too
    return self[0]['expression'].shape[1]

  @property
  def metadata(self) -> Mapping[str, Any]:
    """What the preparation recorded besides the clips."""
    return self._builder.info.metadata or {}

  @functools.cached_property
  def made_by(self) -> dict[str, str]:
    """Maps each feature block to the fingerprint of the network that produced it.

    Empty if the data set does not record it.
    """
    return self.metadata.get('made_by', {})

  def other(self, split: str) -> Self | None:
    """Another split of the same data set; None if it has no such split."""
    if split not in self._builder.info.splits:
      return None
    return type(self)(self.folder, split)

  @functools.cached_property
  def youtube_ids(self) -> np.ndarray:
    """The YouTube video of every clip, str `[n]`.

    '' where it is not known: the corpus does not come from there or does not list it,
    or an older version prepared it.
    """
    corpora = {clip_record.DATASETS[index] for index in np.unique(self.table.dataset)}
    if corpora == {'voxceleb2'}:
      # <person>/<video>, as its folders are named
      return np.array([name.rpartition('/')[2] for name in self.table.video_id])
    listed = self.metadata.get('youtube', {})
    return np.array([listed.get(name, '') for name in self.table.video_id])

  @functools.cached_property
  def fingerprint(self) -> str:
    """Names everything computed from the records; changes with data set and split."""
    parts = [
      (self.folder / name).read_bytes()
      for name in ('dataset_info.json', 'features.json')
    ]
    return hashlib.sha256(b'\0'.join([*parts, self.split.encode()])).hexdigest()[:16]


def _median_above_zero(motion: np.ndarray) -> float:
  measured = motion[motion > 0]
  return float(np.median(measured)) if len(measured) else 0.0


def data_sets(root: pathlib.Path) -> list[pathlib.Path]:
  """The folders of all prepared data sets below `root`.

  That is config.data.dir; features are stored below it too.

  Raises:
    DataError: there is none, or `root` is one.
  """
  folders = sorted(
    pathlib.Path(folder)
    for folder, _, names in walk(root)
    if 'dataset_info.json' in names
  )
  # TFDS writes into folders of this name.
  found = [path for path in folders if not path.name.startswith('incomplete.')]
  if not found:
    raise DataError(
      f'there is no prepared data set below {root}; make one with python -m '
      'data_pipelines.prepare'
    )
  if root in found:
    raise DataError(
      f'{root} is itself a data set; name it with --datasets, and with --data the root '
      'that training gets as config.data.dir'
    )
  return found

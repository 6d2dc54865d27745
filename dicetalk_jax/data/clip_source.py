"""Random access to the clips of a prepared data set, with a table of what each clip
is.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any, Self
import uuid

import numpy as np

from dicetalk_jax.data import clip_record
from dicetalk_jax.errors import DataError


@dataclasses.dataclass(frozen=True, eq=False)
class ClipTable:
  """One row per clip: what samplers must know before they read a record.

  All fields have length `n`.
  """

  clip_id: np.ndarray
  video_id: np.ndarray
  identity: np.ndarray
  dataset: np.ndarray  # index in record.DATASETS
  emotion: np.ndarray  # name, record.UNKNOWN where there is no label
  intensity: np.ndarray
  num_frames: np.ndarray
  motion_head: np.ndarray
  motion_exp: np.ndarray

  def __len__(self) -> int:
    return len(self.clip_id)

  @classmethod
  def scan(cls, records: Iterable[Mapping[str, Any]]) -> Self:
    """Reads the rows from the records."""
    rows = [
      {
        **{
          name: clip_record.decode_text(r, name)
          for name in ('clip_id', 'video_id', 'identity')
        },
        'emotion': clip_record.decode_emotion(r),
        **{
          name: r[name]
          for name in (
            'dataset',
            'intensity',
            'num_frames',
            'motion_head',
            'motion_exp',
          )
        },
      }
      for r in records
    ]
    return cls(
      **{
        f.name: np.array([row[f.name] for row in rows]) for f in dataclasses.fields(cls)
      }
    )

  def save(self, path: pathlib.Path):
    """Writes the table aside and moves it when whole."""
    aside = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
    try:
      with open(aside, 'xb') as file:
        np.savez(
          file, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        )
      os.replace(aside, path)
    finally:
      aside.unlink(missing_ok=True)

  @classmethod
  def load(cls, path: pathlib.Path) -> Self:
    with np.load(path, allow_pickle=False) as arrays:
      return cls(**arrays)


class ClipSource:
  """One split of a prepared data set: `source[i]` is a record, `source.table` says what
  there is.

  Picklable, so that Grain's worker processes can open it anew.

  Args:
    folder: the builder directory that `prepare` returned (it holds
      `dataset_info.json`).
    split: 'train', 'val' or 'test'.

  Raises:
    DataError: the folder holds no data set, or the data set no such split.
  """

  def __init__(self, folder: str | os.PathLike, split: str = 'train'):
    self.folder, self.split = pathlib.Path(folder), split
    if not (self.folder / 'dataset_info.json').exists():
      raise DataError(
        f'{folder} holds no prepared data set; make one with python -m '
        'data_pipelines.prepare'
      )
    if split not in self._builder.info.splits:
      raise DataError(
        f'{folder} has no split {split!r}; it has '
        f'{", ".join(self._builder.info.splits)}'
      )

  def __getstate__(self) -> dict[str, Any]:
    return {'folder': self.folder, 'split': self.split}

  @functools.cached_property
  def _builder(self):
    # seconds to import, and sources are also opened in worker processes
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(self.folder)

  @functools.cached_property
  def _records(self):
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
    """Read from beside the records; made by one pass over them the first time."""
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
    buckets; 0 if none has any.

    Clips without boxes or expressions say 0, and do not count.
    """
    splits = self._builder.info.splits
    source = (
      ClipSource(self.folder, 'train')
      if self.split != 'train' and 'train' in splits
      else self
    )
    measured = (
      motion[motion > 0]
      for motion in (source.table.motion_head, source.table.motion_exp)
    )
    return tuple(
      float(np.median(motion)) if len(motion) else 0.0 for motion in measured
    )

  @functools.cached_property
  def expression_dim(self) -> int:
    """Expression coefficients per frame; 0 if no clip has any, since records without
    rows have a width all the same.
    """
    return self[0]['expression'].shape[1] if self.table.motion_exp.any() else 0

  @functools.cached_property
  def made_by(self) -> dict[str, str]:
    """Maps each feature block to the fingerprint of the network that produced it.

    Empty if the data set does not record it.
    """
    return (self._builder.info.metadata or {}).get('made_by', {})

  @functools.cached_property
  def fingerprint(self) -> str:
    """Changes when the data set or the split does; names everything computed from
    the records.
    """
    parts = [
      (self.folder / name).read_bytes()
      for name in ('dataset_info.json', 'features.json')
    ]
    return hashlib.sha256(b'\0'.join([*parts, self.split.encode()])).hexdigest()[:16]


def data_sets(root: pathlib.Path) -> list[pathlib.Path]:
  """The folders of all prepared data sets below `root`, which is config.data.dir:
  features go below it too.

  Raises:
    DataError: there is none, or `root` is one.
  """
  found = sorted(
    path.parent
    for path in root.rglob('dataset_info.json')
    if not path.parent.name.startswith('incomplete.')
  )  # as TFDS calls what it writes
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

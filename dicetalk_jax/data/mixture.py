"""Mixtures of data sets: endless streams of shuffled examples and their batches.

Every random choice derives from the seed and the position in the stream, never from a
thread or a process. So an iterator restored with `set_state` continues exactly where
`get_state` was called, the number of workers changes nothing, and the batches of the
whole job, shared among processes by `shard`, do not depend on the number of processes,
nor does the state. The number of workers must stay the same within a run, since it is
part of the state.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import os
from typing import Any

from absl import flags
import grain
import numpy as np

from dicetalk_jax.data import clip_record, example_sampling
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.feature_store import Feature
from dicetalk_jax.data.process_shard import ProcessShard
from dicetalk_jax.errors import DataError

_FREED = 'ignore::UserWarning:multiprocessing.resource_tracker'

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DatasetPart:
  """One data set of a mixture.

  Attributes:
    source: its clips.
    features: stored features by name. They are looked up here first and in the records
      second, so a corpus may carry them either way.
    weight: its share of the mixture, relative to the other parts; None where nobody
      has chosen one, see `weights`.
    left_out: clips that are not drawn, by index.
  """

  source: ClipSource
  features: Mapping[str, Feature] = dataclasses.field(default_factory=dict)
  weight: float | None = None
  left_out: frozenset[int] = frozenset()

  @functools.cached_property
  def clips(self) -> np.ndarray:
    """The clips to draw from, by index, ascending."""
    every = np.arange(len(self.source))
    return every[~np.isin(every, list(self.left_out))]

  @property
  def labelled(self) -> bool:
    """Whether any clip has an emotion label: an emotional data set, not a regular
    one.
    """
    return bool((self.source.table.emotion != clip_record.UNKNOWN).any())

  def rows(
    self, name: str, clip: int, record: Mapping[str, Any], rows: slice
  ) -> np.ndarray:
    """Rows of one feature of one clip."""
    if name in self.features:
      return self.features[name](clip, rows)
    return record[name][rows]

  def check_feature(
    self, name: str, lengths: np.ndarray, optional: bool = False
  ) -> None:
    """Refuses a feature that is missing or does not fit its clips.

    Args:
      name: of the feature.
      lengths: the number of rows that each clip must have.
      optional: whether clips may have none instead.

    Raises:
      DataError
    """
    if name not in self.features:
      self._check_in_records(name, lengths[0])
      return
    feature = self.features[name]
    for clip, want in enumerate(lengths):
      have = feature.length(clip)
      if have != want and not (optional and have == 0):
        raise DataError(
          f'{name} of clip {self.source.table.clip_id[clip]} has {have} rows, but its '
          f'frames ask for {want}; delete {feature.folder} to compute the feature again'
        )

  def _check_in_records(self, name: str, want: int) -> None:
    """Checks the first clip only: reading all records would take too long."""
    have = len(self.source[0].get(name, ()))
    if not have:
      raise DataError(
        f'{self.source} has no {name}; compute this feature first or put it into the '
        'records'
      )
    if have != want:
      raise DataError(
        f'{name} in the records of {self.source} has {have} rows in the first clip, '
        f'but its frames ask for {want}; use the clip_stride that it was made with'
      )

  def check_window(self, frames: int, step: int) -> None:
    """Refuses clips that are shorter than a window.

    Raises:
      DataError
    """
    table = self.source.table
    span = example_sampling.window_span(frames, step)
    shortest = int(np.argmin(table.num_frames))
    if table.num_frames[shortest] < span:
      raise DataError(
        f'clip {table.clip_id[shortest]} has {table.num_frames[shortest]} frames, but '
        f'a window of {frames} frames at step {step} needs {span}; use a shorter '
        'window or prepare longer clips'
      )


DatasetParts = DatasetPart | Sequence[DatasetPart]

# Makes the example of a clip from its index and a random generator.
Example = Callable[[int, np.random.Generator], dict[str, Any]]


def weights(parts: Sequence[DatasetPart]) -> list[float]:
  """Shares of the parts, relative to each other.

  If no weight was chosen, emotional and regular data sets get half of the examples
  each, whatever their sizes and numbers (paper section 4.1), in equal shares within
  either half. If some were, the others count as 1.
  """
  if any(part.weight is not None for part in parts):
    return [1.0 if part.weight is None else part.weight for part in parts]
  labelled = [part.labelled for part in parts]
  return [1 / labelled.count(kind) for kind in labelled]


def as_list(parts: DatasetParts) -> list[DatasetPart]:
  """The parts of a mixture, which may be just one."""
  return [parts] if isinstance(parts, DatasetPart) else list(parts)


def example_batches(
  parts: Sequence[DatasetPart],
  make_example: Callable[[DatasetPart], Example],
  *,
  batch: int,
  seed: int,
  shard: tuple[int, int],
  threads: int,
  workers: int,
) -> grain.IterDataset[Batch]:
  """Endless batches of shuffled examples, mixed by weight.

  Args:
    parts: the mixture; see `weights`.
    make_example: gives the function that makes the examples of a part.
    batch: examples per batch of this process.
    seed: of order and examples.
    shard: (index, count) of this process.
    threads: batches read at a time.
    workers: processes that read; 0 = threads of this one.
  """
  # 1. The examples of the whole job. The random choices of one depend on the seed and
  # on its place in the stream only, so on seed, step and row.
  streams = []
  for i, part in enumerate(parts):
    clips = grain.MapDataset.range(len(part.clips)).seed(seed + i).shuffle()
    if part.left_out:
      clips = clips.map(part.clips.__getitem__)
    streams.append(clips.random_map(make_example(part)).repeat())
  stream = streams[0]
  if len(streams) > 1:
    stream = grain.MapDataset.mix(streams, weights=weights(parts))

  # 2. Those of this process. They were drawn before, so processes never draw alike.
  mine = ProcessShard(stream, batch, shard)
  return read_ahead(mine.batch(batch, drop_remainder=True), threads, workers)


def read_ahead(
  batches: grain.MapDataset, threads: int, workers: int
) -> grain.IterDataset[Batch]:
  """Iterates over batches that are read ahead, one per thread."""
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  dataset = batches.to_iter_dataset(options)
  if workers:
    # Workers that end early leave memory behind. Python frees it, and warns of it.
    os.environ.setdefault('PYTHONWARNINGS', _FREED)
    # Grain's workers read absl flags, which not every program parses.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return dataset

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
from typing import Any

from absl import flags
import grain
import numpy as np

from dicetalk_jax.data import clip_record, example_sampling
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.feature_store import Feature
from dicetalk_jax.data.process_shard import ProcessShard
from dicetalk_jax.errors import DataError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DatasetPart:
  """One data set of a mixture: its clips, their stored features by name, and its share
  of the mixture.

  Features are looked up here first and in the record second, so a corpus may carry them
  either way.
  """

  source: ClipSource
  features: Mapping[str, Feature] = dataclasses.field(default_factory=dict)
  weight: float = 1.0

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

  def check_feature(self, name: str, lengths: np.ndarray, optional: bool = False):
    """Refuses a feature that is missing or does not have `lengths[clip]` rows (or none,
    where `optional`).

    Raises:
      DataError
    """
    if name not in self.features:
      have = len(self.source[0].get(name, ()))
      if not have:
        raise DataError(
          f'{self.source} has no {name}; compute this feature first or put it into the '
          'records'
        )
      if have != lengths[0]:  # one clip tells: reading all records would take too long
        raise DataError(
          f'{name} in the records of {self.source} has {have} rows in the first clip, '
          f'but its frames ask for {lengths[0]}; use the clip_stride that it was made '
          'with'
        )
      return
    feature = self.features[name]
    for clip, want in enumerate(lengths):
      if feature.length(clip) not in ((want, 0) if optional else (want,)):
        raise DataError(
          f'{name} of clip {self.source.table.clip_id[clip]} has '
          f'{feature.length(clip)} rows, but its frames ask for {want}; delete '
          f'{feature.folder} to compute the feature anew'
        )

  def check_window(self, frames: int, step: int):
    """Refuses clips that are shorter than a window.

    Raises:
      DataError
    """
    table, span = self.source.table, example_sampling.window_span(frames, step)
    shortest = int(np.argmin(table.num_frames))
    if table.num_frames[shortest] < span:
      raise DataError(
        f'clip {table.clip_id[shortest]} has {table.num_frames[shortest]} frames, but '
        f'a window of {frames} frames at step {step} needs {span}; use a shorter '
        'window or prepare longer clips'
      )


DatasetParts = DatasetPart | Sequence[DatasetPart]


def as_list(parts: DatasetParts) -> list[DatasetPart]:
  return [parts] if isinstance(parts, DatasetPart) else list(parts)


def shuffled_examples(
  parts: Sequence[DatasetPart], example: Callable[[DatasetPart], Callable], seed: int
) -> grain.MapDataset:
  """Endless shuffled examples for the whole job, mixed by weight.

  What is drawn for one depends on the seed and on its place in the stream alone, so on
  seed, step and row.
  """
  streams = [
    grain.MapDataset.range(len(part.source))
    .seed(seed + k)
    .shuffle()
    .random_map(example(part))
    .repeat()
    for k, part in enumerate(parts)
  ]
  return (
    grain.MapDataset.mix(streams, weights=[part.weight for part in parts])
    if len(parts) > 1
    else streams[0]
  )


def process_batches(
  stream: grain.MapDataset, batch: int, shard: tuple[int, int]
) -> grain.MapDataset:
  """Batches of one process.

  Drawing comes before dealing, so processes never draw alike.
  """
  return ProcessShard(stream, batch, shard).batch(batch, drop_remainder=True)


def read_ahead(
  dataset: grain.MapDataset, threads: int, workers: int
) -> grain.IterDataset:
  """Whole batches are read ahead, one per thread."""
  dataset = dataset.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  )
  if workers:
    if (
      not flags.FLAGS.is_parsed()
    ):  # programs without absl flags: Grain's workers read them
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return dataset

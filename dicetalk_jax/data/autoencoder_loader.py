"""Batches of consecutive frames, for training the autoencoder."""

from collections.abc import Callable

import grain
import numpy as np

from dicetalk_jax.data import clip_record, example_sampling, mixture
from dicetalk_jax.data.mixture import Batch, DatasetPart, DatasetParts
from dicetalk_jax.errors import DataError


def frames_loader(
  parts: DatasetParts,
  *,
  batch: int,
  frames: int,
  seed: int,
  step: int = 1,
  shard: tuple[int, int] = (0, 1),
  threads: int = 4,
  workers: int = 0,
) -> grain.IterDataset[Batch]:
  """Pixels, for training the autoencoder.

  Args:
    parts: data sets with pixels, mixed by weight.
    batch: clips per batch of this process.
    frames: F, consecutive frames per example.
    seed: of order and windows.
    step: distance of the frames.
    shard: (index, count) of this process.
    threads: batches read at a time.
    workers: processes that read; 0 = threads of this one.

  Returns:
    Batches `{'video': float32 [B,F,H,W,3] in [-1, 1]}`.

  Raises:
    DataError: a clip is shorter than the window, or there are no pixels.
  """
  parts = mixture.as_list(parts)
  for part in parts:
    part.check_window(frames, step)
    if not part.source[0].get('frames'):
      raise DataError(
        f'{part.source} has no pixels; prepare the data set with content=full'
      )

  def examples(part: DatasetPart) -> Callable[[int, np.random.Generator], Batch]:
    def example(clip: int, rng: np.random.Generator) -> Batch:
      rows = example_sampling.window_rows(
        rng, int(part.source.table.num_frames[clip]), frames, step
      )
      return {
        'video': clip_record.decode_frames(part.source[clip], rows).astype(np.float32)
        / 127.5
        - 1
      }

    return example

  return mixture.read_ahead(
    mixture.process_batches(
      mixture.shuffled_examples(parts, examples, seed), batch, shard
    ),
    threads,
    workers,
  )

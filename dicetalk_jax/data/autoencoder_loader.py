"""Batches of consecutive frames, for training the autoencoder."""

import dataclasses

import grain
import numpy as np

from dicetalk_jax.data import clip_record, example_sampling, mixture
from dicetalk_jax.data.mixture import Batch, DatasetPart, DatasetParts
from dicetalk_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class FrameExamples:
  """Draws frames of one clip. See `frames_loader`.

  Raises:
    DataError: a clip is shorter than the window, or there are no pixels.
  """

  part: DatasetPart
  frames: int
  step: int

  def __post_init__(self) -> None:
    self.part.check_window(self.frames, self.step)
    if not self.part.source[0].get('frames'):
      raise DataError(
        f'{self.part.source} has no pixels; prepare the data set with content=full'
      )

  def __call__(self, clip: int, rng: np.random.Generator) -> Batch:
    length = int(self.part.source.table.num_frames[clip])
    rows = example_sampling.window_rows(rng, length, self.frames, self.step)
    pixels = clip_record.decode_frames(self.part.source[clip], rows)
    return {'video': pixels.astype(np.float32) / 127.5 - 1}


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
  """Loads frames, for training the autoencoder.

  Args:
    parts: data sets with pixels, mixed by weight.
    batch: clips per batch of this process.
    frames: F, consecutive frames per example.
    seed: of order and windows.
    step: from one frame to the next in the source.
    shard: (index, count) of this process.
    threads: batches read at a time.
    workers: processes that read; 0 = threads of this one.

  Returns:
    Batches `{'video': float32 [B,F,H,W,3] in [-1, 1]}`.

  Raises:
    DataError: a clip is shorter than the window, or there are no pixels.
  """
  return mixture.example_batches(
    mixture.as_list(parts),
    lambda part: FrameExamples(part, frames, step),
    batch=batch,
    seed=seed,
    shard=shard,
    threads=threads,
    workers=workers,
  )

"""Measures the speed of the loaders against what one training step consumes.

  python -m benchmarks.loaders

Full-size shapes from a synthetic data set without pixels: latents [N,64,64,4], CLIP
tokens of 1024 and Whisper states [2N,5,384] in float16, priors of 256, all random,
written to a temporary folder and read back through memory maps (from the page cache, so
a slow disk is not measured). `--step_seconds` is the time of one training step of 32
clips; its default is arithmetic, not measurement: 32 clips of 25 frames at 31.9 TFLOP
forward, 4 times that with backward pass and remat, on eight devices of 400 TFLOP/s.
"""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import itertools
import pathlib
import tempfile
import time
from typing import NamedTuple

import grain
import ml_collections
import numpy as np

from configs import diffusion as diffusion_config
from configs import embedder as embedder_config
from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import SyntheticConfig
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.diffusion_loader import diffusion_loader
from dicetalk_jax.data.embedder_loader import embedder_loader
from dicetalk_jax.data.feature_store import Feature, FeatureStore
from dicetalk_jax.data.mixture import DatasetPart

STEP_SECONDS = 32 * 31.9 * 4 / (8 * 400)
READ_AHEAD = 4  # batches that may be ready before the clock starts

# The embedder is timed on groups of two identities: a whole batch of 192 windows has
# 380 MB.
EMBEDDER_IDENTITIES = 2
EMBEDDER_BATCH = 192


class Speed(NamedTuple):
  """Rows per second after the first batches, and seconds to the first batch."""

  rows: float
  first_batch: float


def random_part(
  folder: pathlib.Path, identities: int, clips: int, clip_stride: int
) -> DatasetPart:
  """A data set of 2.4 s clips with features of full size.

  Args:
    folder: an empty one.
    identities: number of them.
    clips: per identity.
    clip_stride: every how many frames there is a CLIP token.
  """
  config = SyntheticConfig(
    train=identities, val=0, test=0, clips=clips, content='embedder'
  )
  source = ClipSource(prepare_synthetic(folder, config))
  store = FeatureStore(folder / 'features', source.fingerprint)
  rng = np.random.default_rng(0)

  def write(
    name: str,
    rows_of: Callable[[int], int],
    shape: tuple[int, ...],
    dtype: type = np.float16,
  ) -> Feature:
    """Stores one feature, of `rows_of(frames)` rows per clip."""

    def values() -> Iterator[tuple[int, np.ndarray]]:
      for clip, frames in enumerate(source.table.num_frames):
        size = (rows_of(int(frames)), *shape)
        yield clip, rng.random(size, np.float32).astype(dtype)

    return store.write(name, 'random', values())

  features = {
    'latents': write('latents', lambda frames: frames, (64, 64, 4)),
    'clip_embed': write(
      'clip_embed', lambda frames: -(-frames // clip_stride), (1024,)
    ),
    'whisper': write('whisper', lambda frames: 2 * frames, (5, 384)),
    'prior': write('prior', lambda frames: 1, (2, 256), np.float32),
  }
  return DatasetPart(source, features)


def measure(dataset: grain.IterDataset, rows: int, batches: int) -> Speed:
  """Reads so many batches of so many rows."""
  with contextlib.closing(iter(dataset)) as iterator:
    start = time.perf_counter()
    next(iterator)
    first_batch = time.perf_counter() - start

    # What was read ahead meanwhile does not count.
    for _ in itertools.islice(iterator, READ_AHEAD):
      pass

    start = time.perf_counter()
    for _ in itertools.islice(iterator, batches):
      pass
    return Speed(batches * rows / (time.perf_counter() - start), first_batch)


def diffusion_speed(
  part: DatasetPart,
  config: ml_collections.ConfigDict,
  rows: int,
  args: argparse.Namespace,
  workers: int,
) -> Speed:
  """Clips per second, with the data settings of the diffusion task."""
  dataset = diffusion_loader(
    part,
    batch=rows,
    frames=config.frames,
    step=config.step,
    mask_size=config.size,
    area=config.area,
    clip_stride=config.clip_stride,
    reference=config.reference,
    seed=0,
    threads=args.threads,
    workers=workers,
  )
  return measure(dataset, rows, args.batches)


def embedder_speed(
  part: DatasetPart,
  config: ml_collections.ConfigDict,
  args: argparse.Namespace,
  workers: int,
) -> Speed:
  """Windows per second, with the data settings of the embedder task."""
  dataset = embedder_loader(
    part,
    identities=EMBEDDER_IDENTITIES,
    emotions=config.emotions,
    clips=config.clips,
    videos=0,
    min_len=config.min_len,
    max_len=config.max_len,
    seed=0,
    threads=args.threads,
    workers=workers,
  )
  windows = EMBEDDER_IDENTITIES * config.emotions * config.clips
  return measure(dataset, windows, args.batches)


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.loaders', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--step_seconds',
    type=float,
    default=STEP_SECONDS,
    help='time of one diffusion step of all processes (default: %(default).2f)',
  )
  parser.add_argument(
    '--processes',
    type=int,
    default=1,
    help='processes that share the clips of a step (default: %(default)s)',
  )
  parser.add_argument(
    '--batches', type=int, default=20, help='timed batches (default: %(default)s)'
  )
  parser.add_argument(
    '--people', type=int, default=8, help='identities (default: %(default)s)'
  )
  parser.add_argument(
    '--clips', type=int, default=16, help='clips per identity (default: %(default)s)'
  )
  parser.add_argument(
    '--workers',
    type=int,
    nargs='+',
    default=(0, 2),
    help='worker processes, one or several numbers (default: 0 2)',
  )
  parser.add_argument(
    '--threads', type=int, default=4, help='reading threads (default: %(default)s)'
  )
  args = parser.parse_args()

  config = diffusion_config.get_config()
  groups = embedder_config.get_config().data
  rows = config.batch_size // args.processes
  needed = rows / args.step_seconds
  print(
    f'a step of {config.batch_size} clips in {args.step_seconds:.2f} s takes '
    f'{needed:.1f} clips/s from each of {args.processes} processes'
  )
  with tempfile.TemporaryDirectory() as folder:
    part = random_part(
      pathlib.Path(folder), args.people, args.clips, config.data.clip_stride
    )
    for workers in args.workers:
      speed = diffusion_speed(part, config.data, rows, args, workers)
      print(
        f'diffusion, {workers} workers: {speed.rows:7.1f} clips/s, '
        f'{speed.rows / needed:5.1f} times what the step takes '
        f'(first batch after {speed.first_batch:.1f} s)',
        flush=True,
      )
      speed = embedder_speed(part, groups, args, workers)
      print(
        f'embedder,  {workers} workers: {speed.rows:7.1f} windows/s, a batch of '
        f'{EMBEDDER_BATCH} in {EMBEDDER_BATCH / speed.rows:.2f} s '
        f'(first batch after {speed.first_batch:.1f} s)',
        flush=True,
      )


if __name__ == '__main__':
  main()

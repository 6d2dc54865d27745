"""Clips per second of the loaders against what one training step consumes: `python -m
benchmarks.loaders`.

Full-size shapes from a synthetic data set without pixels: latents [N,64,64,4], CLIP
tokens of 1024 and Whisper states [2N,5,384] in float16, priors of 256, all random,
written to a temporary folder and read back through memory maps (from the page cache, so
a slow disk is not measured). `--step_seconds` is the time of one training step of 32
clips; its default is arithmetic, not measurement: 32 clips of 25 frames at 31.9 TFLOP
forward, 4 times that with backward pass and remat, on eight devices of 400 TFLOP/s.
"""

import argparse
import contextlib
import itertools
import pathlib
import tempfile
import time

import grain
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


def random_part(
  folder: pathlib.Path, people: int, clips: int, stride: int
) -> DatasetPart:
  """A data set of 2.4 s clips with features of full size."""
  config = SyntheticConfig(train=people, val=0, test=0, clips=clips, content='embedder')
  source = ClipSource(prepare_synthetic(folder, config))
  store, rng = (
    FeatureStore(folder / 'features', source.fingerprint),
    np.random.default_rng(0),
  )

  def write(name: str, rows, shape: tuple[int, ...], dtype=np.float16) -> Feature:
    return store.write(
      name,
      'random',
      (
        (clip, rng.random((rows(int(n)), *shape), np.float32).astype(dtype))
        for clip, n in enumerate(source.table.num_frames)
      ),
    )

  return DatasetPart(
    source,
    {
      'latents': write('latents', lambda n: n, (64, 64, 4)),
      'clip_embed': write('clip_embed', lambda n: -(-n // stride), (1024,)),
      'whisper': write('whisper', lambda n: 2 * n, (5, 384)),
      'prior': write('prior', lambda n: 1, (2, 256), np.float32),
    },
  )


def clips_per_second(
  dataset: grain.IterDataset, rows: int, batches: int
) -> tuple[float, float]:
  """Speed after the first batches, and seconds to the first batch."""
  with contextlib.closing(iter(dataset)) as batches_of:
    start = time.perf_counter()
    next(batches_of)
    first = time.perf_counter() - start
    for _ in itertools.islice(batches_of, 4):  # what was read ahead meanwhile
      pass
    start = time.perf_counter()
    for _ in itertools.islice(batches_of, batches):
      pass
    return batches * rows / (time.perf_counter() - start), first


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--step_seconds',
    type=float,
    default=STEP_SECONDS,
    help='of one diffusion step, all processes',
  )
  parser.add_argument(
    '--processes', type=int, default=1, help='that share the clips of a step'
  )
  parser.add_argument('--batches', type=int, default=20, help='timed')
  parser.add_argument('--people', type=int, default=8)
  parser.add_argument('--clips', type=int, default=16, help='per person')
  parser.add_argument('--workers', type=int, nargs='+', default=(0, 2))
  parser.add_argument('--threads', type=int, default=4)
  args = parser.parse_args()

  config, groups = diffusion_config.get_config(), embedder_config.get_config().data
  data, rows = config.data, config.batch_size // args.processes
  needed = rows / args.step_seconds
  print(
    f'a step of {config.batch_size} clips in {args.step_seconds:.2f} s takes '
    f'{needed:.1f} clips/s from each of {args.processes} processes'
  )
  with tempfile.TemporaryDirectory() as folder:
    part = random_part(pathlib.Path(folder), args.people, args.clips, data.clip_stride)
    for workers in args.workers:
      how = dict(seed=0, threads=args.threads, workers=workers)
      speed, first = clips_per_second(
        diffusion_loader(
          part,
          batch=rows,
          frames=data.frames,
          step=data.step,
          mask_size=data.size,
          area=data.area,
          clip_stride=data.clip_stride,
          reference=data.reference,
          **how,
        ),
        rows,
        args.batches,
      )
      print(
        f'diffusion, {workers} workers: {speed:7.1f} clips/s, {speed / needed:5.1f} '
        f'times what the step takes (first batch after {first:.1f} s)',
        flush=True,
      )
      windows = (
        2 * groups.emotions * groups.clips
      )  # two people: a whole batch of 192 windows has 380 MB
      speed, first = clips_per_second(
        embedder_loader(
          part,
          identities=2,
          emotions=groups.emotions,
          clips=groups.clips,
          videos=0,
          min_len=groups.min_len,
          max_len=groups.max_len,
          **how,
        ),
        windows,
        args.batches,
      )
      print(
        f'embedder,  {workers} workers: {speed:7.1f} windows/s, a batch of 192 in '
        f'{192 / speed:.2f} s (first batch after {first:.1f} s)',
        flush=True,
      )


if __name__ == '__main__':
  main()

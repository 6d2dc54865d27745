"""Compares training in bfloat16 with training in float32.

  python -m benchmarks.bfloat16_training --out benchmarks/results/bfloat16_training.json

Trains `configs/diffusion.py:tiny` on procedural talking faces, with the frozen networks
of the demo model, in both types and from several seeds. Runs of one seed see the same
batches, noise levels and noise, so that their curves differ by rounding alone; the
curves of other seeds say how much difference is chance. An interrupted comparison
resumes. (CPUs compute bfloat16 as float32 and round: slow, but the same result to
rounding.)
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any
from unittest import mock

import ml_collections
import numpy as np

from configs import diffusion
from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import TINY
from dicetalk_jax import bundle
from dicetalk_jax.training import loop
from dicetalk_jax.training.diffusion import DiffusionTask

MODEL = pathlib.Path('examples/demo_model')
DATA = dataclasses.replace(TINY, train=16, val=2, test=0, clips=16, seconds=1.2)
DTYPES = ('float32', 'bfloat16')
EVERY = 10  # steps to a point of the curve


def config_of(dtype: str, seed: int, steps: int) -> ml_collections.ConfigDict:
  """The configuration of a run."""
  config = diffusion.get_config('tiny')
  config.model = str(MODEL)
  whisper = bundle.components(MODEL)['whisper']['config']
  config.audio_linear.channels = whisper['d_model']
  config.dtype = dtype
  config.seed = seed
  config.total_steps = steps
  config.log_every = EVERY
  config.eval_every = config.checkpoint_every = steps
  return config


def curve(folder: pathlib.Path, dtype: str, seed: int, steps: int) -> list[float]:
  """Trains, unless that is done: the mean denoising error of every `EVERY` steps."""
  workdir = folder / f'{dtype}_{seed}'
  config = config_of(dtype, seed, steps)
  config.data.dir = str(folder / 'data')
  nothing: tuple[dict[str, float], dict[str, Any]] = ({}, {})
  with mock.patch.object(DiffusionTask, 'evaluate', lambda task, params: nothing):
    loop.train(DiffusionTask, config, workdir)
  log = (workdir / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in log]
  return [row['train/denoise'] for row in rows if 'train/denoise' in row]


def summary(curves: dict[str, list[list[float]]]) -> dict[str, float]:
  """Compares the second half of the curves.

  Args:
    curves: by type; a curve for each seed, in the same order.

  Returns:
    float32, bfloat16: mean denoising error over all seeds.
    difference: of bfloat16 from float32, root mean square over seeds and points.
    spread: of float32 over seeds, root mean square over points.
  """
  single, half = (np.array(curves[dtype]) for dtype in DTYPES)
  late = slice(single.shape[1] // 2, None)
  single = single[:, late]
  half = half[:, late]
  return {
    'float32': float(single.mean()),
    'bfloat16': float(half.mean()),
    'difference': float(np.sqrt(np.square(half - single).mean())),
    'spread': float(np.sqrt(single.var(axis=0, ddof=1).mean())),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.bfloat16_training', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--folder',
    default='runs/bfloat16_training',
    type=pathlib.Path,
    help='where data and runs go (default: %(default)s)',
  )
  parser.add_argument(
    '--seeds', default=3, type=int, help='at least 2 (default: %(default)s)'
  )
  parser.add_argument(
    '--steps', default=150, type=int, help='of each run (default: %(default)s)'
  )
  parser.add_argument(
    '--out', type=pathlib.Path, help='write curves and summary as JSON'
  )
  args = parser.parse_args()

  prepare_synthetic(str(args.folder / 'data'), DATA)
  curves: dict[str, list[list[float]]] = {dtype: [] for dtype in DTYPES}
  for seed in range(args.seeds):
    for dtype in DTYPES:
      curves[dtype].append(curve(args.folder, dtype, seed, args.steps))
  compared = summary(curves)
  print(json.dumps(compared, indent=2))
  if args.out:
    record = {'steps': args.steps, 'every': EVERY, **compared, 'denoise': curves}
    args.out.write_text(json.dumps(record) + '\n')


if __name__ == '__main__':
  main()

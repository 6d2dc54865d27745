"""A program that trains on clips of which one is damaged, or until it is stopped.

python -m tests.training.refusing WORKERS FIRST_DAMAGED
"""

import contextlib
import sys

import grain
import jax
import numpy as np

from dicetalk_jax import cli, parallel
from dicetalk_jax.data import mixture
from dicetalk_jax.errors import DataError
from dicetalk_jax.training.prefetch import prefetched


class Clips:
  """Reads clips, up to one that is damaged."""

  def __init__(self, first_damaged: int):
    self.first_damaged = first_damaged

  def __call__(self, clip: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if clip >= self.first_damaged:
      raise DataError(f'clip {clip} is damaged; delete it')
    return {'pixels': np.ones((300, 300), np.float32)}


def main(workers: int, first_damaged: int) -> None:
  clips = grain.MapDataset.range(1 << 20).seed(0).random_map(Clips(first_damaged))
  batches = iter(mixture.read_ahead(clips.batch(4), threads=2, workers=workers))
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  with (
    contextlib.closing(batches),
    contextlib.closing(prefetched(batches, mesh)) as data,
  ):
    for step, _ in enumerate(data):
      if step == 1:
        print('training', flush=True)


if __name__ == '__main__':
  with cli.console():
    main(int(sys.argv[1]), int(sys.argv[2]))

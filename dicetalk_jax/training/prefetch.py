"""Batches on their way to the devices while the step before them runs."""

from typing import Any

import grain
from jax.sharding import Mesh

from dicetalk_jax import parallel

AHEAD = 2  # batches on the devices beside the one in use


class _OnMesh:
  """An iterator whose batches are laid out on the mesh."""

  def __init__(self, batches: grain.DatasetIterator, mesh: Mesh):
    self.batches, self.mesh = batches, mesh
    self.get_state, self.set_state = batches.get_state, batches.set_state

  def __iter__(self):
    return self

  def __next__(self) -> Any:
    return parallel.put_batch(next(self.batches), self.mesh)


def prefetched(batches: grain.DatasetIterator, mesh: Mesh) -> grain.DatasetIterator:
  """Global arrays of each batch, made by a thread `AHEAD` batches ahead; close it
  before `batches`.

  Its state is that of the batch it gave last, not of those in preparation: a run that
  resumes from it repeats none and leaves none out.
  """
  return grain.experimental.ThreadPrefetchDatasetIterator(_OnMesh(batches, mesh), AHEAD)

"""Moves batches to the devices while the step before them runs."""

from typing import Any

import grain
from jax.sharding import Mesh

from dicetalk_jax import interrupt, parallel

AHEAD = 2  # batches on the devices, besides the one in use


class _OnMesh:
  """An iterator whose batches are laid out on the mesh."""

  def __init__(self, batches: grain.DatasetIterator, mesh: Mesh):
    self.batches = batches
    self.mesh = mesh
    self.get_state = batches.get_state
    self.set_state = batches.set_state

  def __iter__(self) -> '_OnMesh':
    return self

  def __next__(self) -> Any:
    with interrupt.shielded():  # the first call starts the processes that read
      batch = next(self.batches)
    return parallel.put_batch(batch, self.mesh)


def prefetched(batches: grain.DatasetIterator, mesh: Mesh) -> grain.DatasetIterator:
  """Yields each batch as global arrays; a thread makes them `AHEAD` batches ahead.

  Close it before `batches`. Its state is that of the batch it returned last, not of
  those in preparation, so a run that resumes from it repeats none and skips none.
  """
  return grain.experimental.ThreadPrefetchDatasetIterator(_OnMesh(batches, mesh), AHEAD)

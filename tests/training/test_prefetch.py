"""Batches on the mesh ahead of time, from worker processes: the same batches, and
exact resume.
"""

import contextlib
import itertools
import time

import grain
import numpy as np
import pytest

from dicetalk_jax import parallel
from dicetalk_jax.data.mixture import read_ahead
from dicetalk_jax.errors import MeshError
from dicetalk_jax.training.prefetch import AHEAD, prefetched

MESH = parallel.make_mesh(data=-1, fsdp=1)


def stream(workers=0, rows=8):
  def draw(i, rng):
    return {'clip': np.int32(i), 'drop': rng.random(dtype=np.float32)}

  data = (
    grain.MapDataset.range(20).seed(3).shuffle().random_map(draw).repeat().batch(rows)
  )
  return iter(read_ahead(data, threads=2, workers=workers))


def assert_equal(a, b):
  for name in ('clip', 'drop'):
    np.testing.assert_array_equal(
      np.asarray(a[name]), np.asarray(b[name]), err_msg=name
    )


@pytest.mark.parametrize('workers', [0, 2])
def test_a_resumed_run_repeats_and_misses_nothing(workers):
  want = list(itertools.islice(stream(), 9))
  with (
    contextlib.closing(stream(workers)) as batches,
    contextlib.closing(prefetched(batches, MESH)) as data,
  ):
    for i in range(4):
      batch = next(data)
      assert batch['clip'].sharding == parallel.batch_sharding(MESH)
      assert_equal(batch, want[i])
    state = data.get_state()
    for i in range(4, 6):
      assert_equal(next(data), want[i])
    data.set_state(state)
    for i in range(4, 9):
      assert_equal(next(data), want[i])


def test_the_state_is_that_of_the_batch_in_use():
  plain = stream()
  with contextlib.closing(prefetched(stream(), MESH)) as data:
    assert data.get_state() == plain.get_state()
    for _ in range(3):
      next(data), next(plain)
      assert data.get_state() == plain.get_state()


def test_batches_are_on_the_devices_before_they_are_asked_for(monkeypatch):
  put = []
  placed = parallel.put_batch
  monkeypatch.setattr(
    parallel,
    'put_batch',
    lambda batch, mesh: put.append(placed(batch, mesh)) or put[-1],
  )
  with contextlib.closing(prefetched(stream(), MESH)) as data:
    next(data)
    deadline = time.monotonic() + 60
    while len(put) <= AHEAD and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.1)
    assert (
      AHEAD < len(put) <= AHEAD + 2
    )  # one in use, the queue full, at most one waiting for room


def test_mistakes_in_the_thread_reach_the_loop():
  with (
    contextlib.closing(prefetched(stream(rows=6), MESH)) as data,
    pytest.raises(MeshError, match='batch_size=6'),
  ):
    next(data)

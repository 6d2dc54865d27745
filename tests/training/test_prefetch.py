"""Batches on the mesh ahead of time, from worker processes: the same batches, and
exact resume.
"""

import contextlib
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import grain
import numpy as np
import pytest

from dicetalk_jax import parallel
from dicetalk_jax.data.mixture import read_ahead
from dicetalk_jax.errors import DataError, MeshError
from dicetalk_jax.training import run_context
from dicetalk_jax.training.loop import train
from dicetalk_jax.training.prefetch import AHEAD, prefetched
from tests.training import refusing, toy

ROOT = pathlib.Path(__file__).parents[2]
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


def start(workers, first_damaged):
  return subprocess.Popen(
    [sys.executable, '-m', refusing.__name__, str(workers), str(first_damaged)],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    start_new_session=True,  # with a group of its own, as in a terminal
  )


@pytest.mark.parametrize('workers', [0, 2])
def test_a_refusal_while_reading_is_one_sentence(workers):
  process = start(workers, first_damaged=80)
  out, err = process.communicate()
  assert (process.returncode, out) == (2, 'training\n')
  assert re.fullmatch(r'error: clip \d+ is damaged; delete it\n', err)


def test_ctrl_c_reaches_processes_that_read_as_one_line():
  process = start(workers=2, first_damaged=1 << 20)
  assert process.stdout.readline() == 'training\n'
  os.killpg(process.pid, signal.SIGINT)
  _, err = process.communicate()
  assert (process.returncode, err) == (130, 'interrupted; run the same command again\n')


def test_a_loader_that_refuses_leaves_no_checkpoint_threads(tmp_path, monkeypatch):
  """They clean up in the background, and would be cut off."""

  class Refusing(toy.ToyTask):
    def batches(self):
      raise DataError('clip 3 is damaged; delete it')

  opened = []
  monkeypatch.setattr(run_context, 'Checkpoints', lambda *args: opened.append(args))
  with pytest.raises(DataError, match='clip 3'):
    train(Refusing, toy.get_config(), tmp_path, mesh=MESH)
  assert not opened

"""The diffusion task trains alike however it is run: in parts, with worker processes,
on eight devices.
"""

import shutil

import numpy as np
import pytest

from dicetalk_jax.training.diffusion import DiffusionTask
from tests.training import micro


@pytest.fixture
def again(trained, tmp_path, monkeypatch):
  """again(name, **how): the diffusion run once more, in another way; its losses."""
  shutil.copytree(trained / 'data', tmp_path / 'data')
  # The losses of training are compared, nothing else.
  monkeypatch.setattr(DiffusionTask, 'evaluate', lambda self, params: ({}, {}))

  def again(name, **how):
    micro.run('diffusion', tmp_path / name, model=trained / 'embedder/model', **how)
    return micro.losses(tmp_path, name)

  return again


def test_continued_diffusion_run_equals_the_uninterrupted_one_to_the_bit(
  trained, again
):
  whole = micro.losses(trained, 'diffusion')
  assert len(whole) == micro.STEPS
  assert again('halves', stop=2) == whole[:2]
  assert again('halves') == whole


@pytest.mark.slow
def test_worker_processes_change_nothing(trained, again):
  """Neither in a run nor in its continuation."""
  whole = micro.losses(trained, 'diffusion')
  assert again('workers', workers=1, stop=2) == whole[:2]
  assert again('workers', workers=1) == whole


def test_eight_devices_agree_with_one(trained, again):
  eight = again('eight', sizes=(2, 2, 2), remat='block')
  np.testing.assert_allclose(eight, micro.losses(trained, 'diffusion'), rtol=1e-4)

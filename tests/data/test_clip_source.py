"""The table of a data set: its file, and what follows from it."""

import dataclasses
import os

import numpy as np
import pytest

from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import SyntheticConfig
from dicetalk_jax.data.clip_source import ClipSource, ClipTable, data_sets


@pytest.fixture
def folder(tmp_path):
  config = SyntheticConfig(
    size=16, train=1, val=1, test=0, clips=4, seconds=0.2, content='embedder'
  )
  return prepare_synthetic(tmp_path, config, workers=1)


def moving(source, head, expression):
  """The source with another table next to its records."""
  table = dataclasses.replace(
    source.table, motion_head=np.float32(head), motion_exp=np.float32(expression)
  )
  table.save(source.folder / f'clips-{source.split}.npz')
  return ClipSource(source.folder, source.split)


def test_others_may_read_the_table(folder, tmp_path):
  table = ClipSource(folder).table
  path = tmp_path / 'clips.npz'
  before = os.umask(0o022)
  try:
    table.save(path)
  finally:
    os.umask(before)
  assert path.stat().st_mode & 0o777 == 0o644
  again = ClipTable.load(path)
  for field in dataclasses.fields(table):
    np.testing.assert_array_equal(
      getattr(again, field.name), getattr(table, field.name)
    )


def test_a_table_that_cannot_be_written_leaves_nothing(folder, monkeypatch):
  table = ClipSource(folder).table
  before = sorted(folder.iterdir())

  def full(file, **arrays):
    file.write(b'half')
    raise OSError('no space left on device')

  monkeypatch.setattr(np, 'savez', full)
  with pytest.raises(OSError, match='no space'):
    table.save(folder / 'clips-train.npz')
  assert sorted(folder.iterdir()) == before
  assert len(ClipTable.load(folder / 'clips-train.npz')) == 4


def test_the_width_of_expressions_is_that_of_clips_that_have_some(folder):
  source = ClipSource(folder)
  assert source.expression_dim == 64
  assert moving(source, np.ones(4), [0, 0, 0, 0.1]).expression_dim == 64
  assert moving(source, np.ones(4), np.zeros(4)).expression_dim == 0


def test_only_measured_clips_count_in_the_motion_medians(folder):
  source = moving(ClipSource(folder), [0, 0.25, 0, 0.75], [0, 0, 3, 0])
  assert source.motion_medians == ClipSource(folder, 'val').motion_medians == (0.5, 3)
  assert moving(source, np.zeros(4), np.arange(4)).motion_medians == (0, 2)


def test_linked_data_sets_are_found(folder, tmp_path):
  root = tmp_path / 'root'
  root.mkdir()
  (root / 'synthetic').symlink_to(folder.parents[1])
  (root / 'again').symlink_to(root)  # leads back
  name = folder.relative_to(folder.parents[1])
  assert data_sets(root) == [root / 'synthetic' / name]

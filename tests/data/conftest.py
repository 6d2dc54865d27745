"""Data sets that tests share and do not change."""

import pytest

from tests.data.memory_clips import ClipsInMemory, with_features


@pytest.fixture(scope='session')
def part(tmp_path_factory):
  """An emotional data set: three identities with eight clips each."""
  return with_features(ClipsInMemory(), tmp_path_factory.mktemp('features'))


@pytest.fixture(scope='session')
def regular(tmp_path_factory):
  """A data set without emotion labels: six recordings of two clips each."""
  source = ClipsInMemory(people=2, clips=6, dataset='hdtf', labelled=False)
  return with_features(source, tmp_path_factory.mktemp('features'))

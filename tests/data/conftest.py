"""The data sets that the loaders' tests share; none of them changes them."""

import pytest

from tests.data.memory_clips import ClipsInMemory, with_features


@pytest.fixture(scope='session')
def part(tmp_path_factory):
  """An emotional data set: three people with eight clips each."""
  return with_features(ClipsInMemory(), tmp_path_factory.mktemp('features'))


@pytest.fixture(scope='session')
def regular(tmp_path_factory):
  """A data set without emotion labels: six recordings of two clips each."""
  source = ClipsInMemory(people=2, clips=6, dataset='hdtf', labelled=False)
  return with_features(source, tmp_path_factory.mktemp('features'))

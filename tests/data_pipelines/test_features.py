"""Feature files: reading rows, reuse, atomicity."""

import pickle

import numpy as np
import pytest

from data_pipelines.features import FeatureStore
from dicetalk_jax.errors import DataError


def _arrays(lengths=(3, 0, 5), dtype=np.float16):
  rng = np.random.default_rng(0)
  return [(clip, rng.normal(size=(n, 2, 4)).astype(dtype)) for clip, n in enumerate(lengths)]


@pytest.fixture
def store(tmp_path):
  return FeatureStore(tmp_path, 'data')


@pytest.mark.parametrize('dtype', (np.float16, np.float32, np.int32))
def test_rows_come_back(store, dtype):
  arrays = _arrays(dtype=dtype)
  feature = store.write('latents', 'vae', reversed(arrays))
  assert len(feature) == 3
  for clip, array in arrays:
    assert feature.length(clip) == len(array)
    for rows in (slice(None), slice(1, 4, 2), slice(2, 2), slice(-2, None)):
      got = feature(clip, rows)
      assert got.dtype == dtype
      np.testing.assert_array_equal(got, array[rows])


def test_the_header_has_room_for_any_length(store):
  feature = store.write('long', 'x', ((i, np.full((997, 1), i, np.int32)) for i in range(1100)))
  np.testing.assert_array_equal(feature(1099), 1099)
  assert feature.data.shape == (997 * 1100, 1)


def test_a_feature_can_be_pickled_and_copied_out(store):
  feature = store.write('latents', 'vae', _arrays())
  again = pickle.loads(pickle.dumps(feature))
  np.testing.assert_array_equal(again(2), feature(2))
  assert feature(2).flags.writeable and not isinstance(feature(2), np.memmap)


def test_a_complete_feature_is_reused(store):
  store.write('latents', 'vae', _arrays())

  def must_not_run():
    raise AssertionError
    yield

  assert store.complete('latents', 'vae')
  np.testing.assert_array_equal(store.write('latents', 'vae', must_not_run())(0), _arrays()[0][1])


def test_another_network_or_data_set_is_another_feature(store, tmp_path):
  store.write('latents', 'vae', _arrays())
  assert not store.complete('latents', 'other')
  assert not FeatureStore(tmp_path, 'other').complete('latents', 'vae')
  with pytest.raises(DataError, match='latents-other is missing'):
    store.read('latents', 'other')


def test_an_interrupted_feature_is_built_anew(store):
  def broken():
    yield from _arrays()[:2]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    store.write('latents', 'vae', broken())
  assert not store.complete('latents', 'vae')
  assert not list(store.folder.iterdir())
  (store.folder / '.latents-vae-dead').mkdir()  # what a killed run leaves
  assert len(store.write('latents', 'vae', _arrays())) == 3


def test_who_finishes_second_uses_the_first(store):
  def slow():
    yield 0, np.zeros((1, 1))
    FeatureStore(store.folder.parent, 'data').write('latents', 'vae', [(0, np.ones((1, 1)))])

  assert store.write('latents', 'vae', slow())(0) == 1
  assert [p.name for p in store.folder.iterdir()] == ['latents-vae']


def test_what_does_not_fit_is_refused(store):
  with pytest.raises(DataError, match='clip 1 are float32'):
    store.write('a', 'x', [(0, np.zeros((1, 2), np.float16)), (1, np.zeros((1, 2), np.float32))])
  with pytest.raises(DataError, match='clip 1 are'):
    store.write('a', 'x', [(0, np.zeros((1, 2))), (1, np.zeros((1, 3)))])
  with pytest.raises(DataError, match='comes twice'):
    store.write('a', 'x', [(0, np.zeros((1, 2)))] * 2)
  with pytest.raises(DataError, match='no clips'):
    store.write('a', 'x', [])
  feature = store.write('a', 'x', [(0, np.zeros((1, 2))), (2, np.zeros((1, 2)))])
  for clip in (1, 3, -1):
    with pytest.raises(DataError, match=f'no clip {clip}'):
      feature(clip)

"""Feature files: reading rows, reuse, interrupted runs, lost ends of files, several
processes.
"""

import os
import pickle
import threading

import numpy as np
import pytest

from dicetalk_jax.data import feature_store
from dicetalk_jax.data.feature_store import FeatureStore
from dicetalk_jax.errors import DataError


def _arrays(lengths=(3, 0, 5), dtype=np.float16):
  rng = np.random.default_rng(0)
  return [
    (clip, rng.normal(size=(n, 2, 4)).astype(dtype)) for clip, n in enumerate(lengths)
  ]


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
  feature = store.write(
    'long', 'x', ((i, np.full((997, 1), i, np.int32)) for i in range(1100))
  )
  np.testing.assert_array_equal(feature(1099), 1099)
  (data,) = feature.folder.glob('*.npy')
  assert np.load(data, mmap_mode='r').shape == (997 * 1100, 1)


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
  np.testing.assert_array_equal(
    store.write('latents', 'vae', must_not_run())(0), _arrays()[0][1]
  )


def test_another_network_or_data_set_is_another_feature(store, tmp_path):
  store.write('latents', 'vae', _arrays())
  assert not store.complete('latents', 'other')
  assert not FeatureStore(tmp_path, 'other').complete('latents', 'vae')
  with pytest.raises(DataError, match='latents-other is missing'):
    store.read('latents', 'other')


def names(store):
  return sorted(p.name for p in store.folder.iterdir())


def broken(n):
  yield from _arrays()[:n]
  raise KeyboardInterrupt


def test_what_an_interrupted_run_has_stored_stays(store):
  with pytest.raises(KeyboardInterrupt):
    store.write('latents', 'vae', broken(2))
  assert not store.complete('latents', 'vae')
  with pytest.raises(DataError, match='latents-vae is incomplete'):
    store.read('latents', 'vae')
  assert list(store.read_part('latents', 'vae').lengths) == [3, 0]
  (torn,) = (store.folder / '.latents-vae').glob('*.clips')
  torn.write_bytes(torn.read_bytes() + b'half')  # killed while it wrote a pair,
  with open(torn.with_suffix('.npy'), 'ab') as file:
    file.write(b'rows without a pair')  # or rows

  asked = []

  def compute(clips):
    asked.extend(clips)
    return [_arrays()[clip] for clip in clips]

  assert store.fill('latents', 'vae', 3, compute)
  assert asked == [2] and names(store) == ['latents-vae']
  feature = store.read('latents', 'vae')
  for clip, array in _arrays():
    np.testing.assert_array_equal(feature(clip), array)
  assert store.fill('latents', 'vae', 3, compute) and asked == [2]


@pytest.mark.parametrize(
  ('lost', 'missing'), [(1, [2]), (80, [2]), (81, [0, 1, 2]), (200, [0, 1, 2])]
)
def test_clips_at_the_lost_end_of_a_file_are_computed_again(store, lost, missing):
  """After a power cut: of 8 rows of 16 bytes behind a header of 128, the last bytes."""
  with pytest.raises(KeyboardInterrupt):
    store.write('latents', 'vae', broken(3))
  (data,) = (store.folder / '.latents-vae').glob('*.npy')
  assert data.stat().st_size == 256
  os.truncate(data, 256 - lost)
  if missing == [2]:
    assert list(store.read_part('latents', 'vae').lengths) == [3, 0, -1]
  asked = []

  def compute(clips):
    asked.extend(clips)
    return [_arrays()[clip] for clip in clips]

  assert store.fill('latents', 'vae', 3, compute) and asked == missing
  for clip, array in _arrays():
    np.testing.assert_array_equal(store.read('latents', 'vae')(clip), array)


@pytest.mark.parametrize('every', [-1.0, 1e9])
def test_rows_are_on_the_disk_before_their_pairs(store, monkeypatch, every):
  safe, sync = {}, os.fsync

  def fsync(file):
    sync(file)
    safe[os.fstat(file).st_ino] = os.fstat(file).st_size

  monkeypatch.setattr(os, 'fsync', fsync)
  monkeypatch.setattr(feature_store, 'SYNC_EVERY', every)
  part = store.folder / '.latents-vae'
  seen = []

  def items():
    for clip in range(5):
      yield clip, np.full((3, 2), clip)
      (pairs,) = part.glob('*.clips')
      seen.append(pairs.stat().st_size // 16)
      assert safe[pairs.with_suffix('.npy').stat().st_ino] >= 128 + 48 * seen[-1]
      assert safe[pairs.stat().st_ino] == 16 * seen[-1]

  feature = store.write('latents', 'vae', items())
  assert seen == (
    [1, 2, 3, 4, 5] if every < 0 else [1] * 5
  )  # many short clips go together
  assert len(feature) == 5 and set(safe.values()) == {128 + 5 * 48, 5 * 16}


def test_processes_share_the_clips(store):
  asked = {}

  def run(index):
    def compute(clips):
      for clip in clips:
        asked.setdefault(index, []).append(clip)
        yield clip, np.full((clip, 2), clip)

    return store.fill('latents', 'vae', 7, compute, (index, 3))

  assert [run(1), run(0), run(0)] == [
    False
  ] * 3  # the second time, there is nothing left to do
  with pytest.raises(DataError, match='5 of 7 clips.*a disk that they share'):
    store.wait('latents', 'vae', 7, patience=0.01)
  later = threading.Timer(0.2, run, [2])
  later.start()
  feature = store.wait(
    'latents', 'vae', 7
  )  # opened as soon as the last process is done
  later.join()
  assert asked == {0: [0, 3, 6], 1: [1, 4], 2: [2, 5]}
  assert list(feature.lengths) == list(range(7))
  for clip in range(7):
    assert (feature(clip) == clip).all()
  assert len(list(feature.folder.glob('*.npy'))) == 3


def test_two_runs_of_one_share_do_no_harm(store):
  def slow():
    yield 0, np.zeros((1, 1))
    same = FeatureStore(store.folder.parent, 'data')
    assert (
      same.write('latents', 'vae', [(0, np.ones((1, 1))), (1, np.ones((1, 1)))])(1) == 1
    )
    yield 1, np.zeros((1, 1))

  feature = store.write('latents', 'vae', slow())
  assert len(feature) == 2 and feature(0) == 0 and names(store) == ['latents-vae']


def test_a_damaged_feature_is_named(store):
  feature = store.write('latents', 'vae', _arrays())
  (data,) = feature.folder.glob('*.npy')
  data.write_bytes(data.read_bytes()[:-1])

  def complete():
    return store.complete('latents', 'vae')

  def fill():
    return store.fill('latents', 'vae', 3, lambda clips: [])

  for use in (lambda: store.read('latents', 'vae'), complete, fill):
    with pytest.raises(DataError, match='latents-vae is damaged.*delete it'):
      use()
  (feature.folder / data.with_suffix('.clips')).unlink()  # as an older layout has none
  for use in (lambda: store.read('latents', 'vae'), complete, fill):
    with pytest.raises(
      DataError,
      match='latents-vae holds no clips; delete it to compute the feature anew',
    ):
      use()


def test_what_does_not_fit_is_refused(store):
  with pytest.raises(DataError, match='clip 1 are float32'):
    store.write(
      'a', 'x', [(0, np.zeros((1, 2), np.float16)), (1, np.zeros((1, 2), np.float32))]
    )
  with pytest.raises(DataError, match='clip 1 are'):
    store.write('b', 'x', [(0, np.zeros((1, 2))), (1, np.zeros((1, 3)))])
  with pytest.raises(DataError, match='comes twice'):
    store.write('c', 'x', [(0, np.zeros((1, 2)))] * 2)
  with pytest.raises(DataError, match='no clips'):
    store.write('d', 'x', [])
  feature = store.write('e', 'x', [(0, np.zeros((1, 2))), (2, np.zeros((1, 2)))])
  for clip in (1, 3, -1):
    with pytest.raises(DataError, match=f'no clip {clip}'):
      feature(clip)

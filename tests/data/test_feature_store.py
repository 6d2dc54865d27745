"""Feature files: rows, reuse, interrupted runs, lost rows, several processes."""

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


def test_shards_are_files_that_numpy_reads(store):
  feature = store.write(
    'long', 'x', ((i, np.full((997, 1), i, np.int32)) for i in range(1100))
  )
  np.testing.assert_array_equal(feature(1099), 1099)
  shards = [np.load(path, mmap_mode='r') for path in feature.folder.glob('*.npy')]
  assert sorted(len(rows) // 997 for rows in shards) == [76, 256, 256, 256, 256]


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


def broken(arrays):
  """Items of a run that is interrupted at its end."""
  yield from arrays
  raise KeyboardInterrupt


class Recorder:
  """Computes clips and keeps a list of those that it was asked for."""

  def __init__(self, arrays):
    self.arrays = arrays
    self.asked = []

  def __call__(self, clips):
    self.asked += clips
    return [self.arrays[clip] for clip in clips]


def assert_holds(store, arrays):
  feature = store.read('latents', 'vae')
  assert len(feature) == len(arrays)
  for clip, array in arrays:
    np.testing.assert_array_equal(feature(clip), array)


def test_an_interrupted_run_loses_the_shard_that_it_was_writing(store, monkeypatch):
  monkeypatch.setattr(feature_store, 'SHARD_CLIPS', 2)
  arrays = _arrays((3, 0, 5, 1, 2, 4, 2))
  with pytest.raises(KeyboardInterrupt):
    store.write('latents', 'vae', broken(arrays[:5]))
  assert not store.complete('latents', 'vae')
  with pytest.raises(DataError, match='latents-vae is incomplete'):
    store.read('latents', 'vae')
  assert list(store.read_part('latents', 'vae').lengths) == [3, 0, 5, 1]
  (store.folder / '.latents-vae' / '.killed.npy.1.part').write_bytes(b'half a shard')

  compute = Recorder(arrays)
  assert store.fill('latents', 'vae', len(arrays), compute)
  assert compute.asked == [4, 5, 6]
  assert names(store) == ['latents-vae']
  assert len(list((store.folder / 'latents-vae').iterdir())) == 2 * 4
  assert_holds(store, arrays)
  assert store.fill('latents', 'vae', len(arrays), compute)
  assert compute.asked == [4, 5, 6]


@pytest.mark.parametrize('lost', [1, 128, 129])
def test_a_shard_that_has_lost_rows_is_computed_again(store, monkeypatch, lost):
  """After a power cut: of 8 rows of 16 bytes behind a header of 128, the last bytes."""
  monkeypatch.setattr(feature_store, 'SHARD_CLIPS', 3)
  arrays = _arrays((3, 0, 5, 2, 2, 2, 1))
  with pytest.raises(KeyboardInterrupt):
    store.write('latents', 'vae', broken(arrays[:6]))
  (damaged,) = [
    path.with_suffix('.npy')
    for path in store.folder.rglob('*.clips')
    if 0 in np.fromfile(path, np.int64)[::2]
  ]
  assert damaged.stat().st_size == 256
  os.truncate(damaged, 256 - lost)
  assert list(store.read_part('latents', 'vae').lengths) == [-1, -1, -1, 2, 2, 2]
  compute = Recorder(arrays)
  assert store.fill('latents', 'vae', 7, compute)
  assert compute.asked == [0, 1, 2, 6]
  assert_holds(store, arrays)


def test_rows_are_on_the_disk_before_their_pairs(store, monkeypatch):
  monkeypatch.setattr(feature_store, 'SHARD_CLIPS', 2)
  sync = os.fsync
  safe = {}

  def fsync(file):
    sync(file)
    safe[os.fstat(file).st_ino] = os.fstat(file).st_size

  monkeypatch.setattr(os, 'fsync', fsync)
  folder = store.folder / '.latents-vae'
  stored = []

  def items():
    for clip in range(5):
      stored.append(0)
      for pairs in folder.glob('*.clips'):
        stored[-1] += len(np.fromfile(pairs, np.int64)) // 2
        rows = pairs.with_suffix('.npy').stat()
        assert safe[rows.st_ino] == rows.st_size
      yield clip, np.full((3, 2), clip)

  feature = store.write('latents', 'vae', items())
  assert stored == [0, 0, 2, 2, 4]
  assert len(feature) == 5


def journal(folder, arrays, header=0, torn=b''):
  """Writes as versions before whole shards did: one file per run, which only grew.

  A killed run left a header that counts no rows, rows without a pair, and a torn pair.
  """
  folder.mkdir(parents=True)
  rows = np.concatenate([array for _, array in arrays])
  with open(folder / 'run.npy', 'wb') as file:
    feature_store._write_header(file, header, rows)
    file.write(rows.tobytes() + torn)
  pairs = np.array([(clip, len(array)) for clip, array in arrays], np.int64)
  (folder / 'run.clips').write_bytes(pairs.tobytes() + torn)


@pytest.mark.parametrize('torn', [b'', b'half'])
def test_features_of_earlier_versions_are_read(store, torn):
  journal(store.folder / 'latents-vae', _arrays(), torn=torn)
  assert store.complete('latents', 'vae')
  assert_holds(store, _arrays())


@pytest.mark.parametrize('lost', [0, 1])
def test_a_run_of_an_earlier_version_is_completed(store, lost):
  folder = store.folder / '.latents-vae'
  journal(folder, _arrays()[:2], torn=b'half')
  if lost:
    os.truncate(folder / 'run.npy', 128 + 3 * 16 - lost)
  compute = Recorder(_arrays())
  assert store.fill('latents', 'vae', 3, compute)
  assert compute.asked == ([0, 1, 2] if lost else [2])
  assert_holds(store, _arrays())


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
  assert len(feature) == 2
  assert (feature(0), feature(1)) == (1, 1)  # of the run that was faster
  assert names(store) == ['latents-vae']
  assert len(list(feature.folder.iterdir())) == 2


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
      match='latents-vae holds no clips; delete it to compute the feature again',
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

"""The command that computes features: its results, processes and refusals."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from data_pipelines import precompute
from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import SyntheticConfig
from dicetalk_jax import bundle
from dicetalk_jax.component import Component
from dicetalk_jax.data import face_crops, feature_extraction
from dicetalk_jax.data.clip_record import decode_audio, decode_frames
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.feature_store import Feature
from dicetalk_jax.errors import ConfigError, DataError, WeightsError
from dicetalk_jax.media import audio, image
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp('model')
  tiny.save_components(folder, tiny.FEATURE_CONFIGS)
  return folder


@pytest.fixture(scope='module')
def networks(model):
  return {name: Component.load(model, name) for name in bundle.components(model)}


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
  config = SyntheticConfig(size=16, train=1, val=1, test=0, clips=6, seconds=0.7)
  return prepare_synthetic(tmp_path_factory.mktemp('data'), config, workers=1)


@pytest.fixture
def data(dataset, tmp_path):
  """A root with the data set and no features."""
  (tmp_path / 'set').symlink_to(dataset)
  return tmp_path


def compute(model, data, *flags):
  precompute.main(
    [f'--model={model}', f'--data={data}', f'--datasets={data}/set', *flags]
  )


def stored(data, source):
  """The features of a data set by name."""
  return {
    path.name.rpartition('-')[0]: Feature(path)
    for path in (data / 'features' / source.fingerprint).iterdir()
  }


def shards(feature):
  return list(feature.folder.glob('*.npy'))


@pytest.fixture(scope='module')
def whole(model, dataset, tmp_path_factory):
  """All features, made in one run on one device."""
  folder = tmp_path_factory.mktemp('whole')
  (folder / 'set').symlink_to(dataset)
  devices = jax.local_devices()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'local_devices', lambda: devices[:1])
    compute(model, folder, '--batch=4')
  return folder


def apply(network, *inputs):
  return network(*inputs)


def encode(vae, pixels):
  return vae.encode(pixels)[0]


def test_each_feature_is_what_its_network_computes(networks, dataset, whole):
  source = ClipSource(dataset, 'train')
  features = stored(whole, source)
  assert {name: feature(0).dtype.name for name, feature in features.items()} == {
    'latents': 'float16',
    'clip_embed_5': 'float16',
    'whisper': 'float16',
    'prior': 'float32',
  }
  for feature in features.values():
    assert (feature.lengths >= 0).tolist() == [True] * 6

  clip = 4  # its rows are in several batches
  record = source[clip]
  count = record['num_frames']
  frames = decode_frames(record)

  latents = networks['vae'].stage(encode)(frames / np.float32(127.5) - 1)
  np.testing.assert_allclose(features['latents'](clip), latents, atol=2e-3)

  pixels = np.stack([image.clip_pixels(frame, 28) for frame in frames[::5]])
  embedding = networks['image_encoder'].stage(apply)(pixels)
  np.testing.assert_allclose(features['clip_embed_5'](clip), embedding, atol=2e-3)

  mel = audio.log_mel(decode_audio(record))
  states = networks['whisper'].stage(apply)(mel)[0, : 2 * count]
  np.testing.assert_allclose(features['whisper'](clip), states, atol=4e-3)

  # The clip is longer than the 12 frames that the embedder reads: its prior is the mean
  # of two windows.
  assert 12 < count <= 24
  half = -(-count // 2)
  present = np.ones(1, bool)
  windows = []
  for rows in (slice(0, half), slice(half, count)):
    mu, var = networks['embedder'].stage(apply)(
      record['expression'][None, rows],
      features['whisper'](clip)[None, 2 * rows.start : 2 * rows.stop],
      np.ones((1, rows.stop - rows.start), bool),
      present,
      present,
    )
    windows.append((mu[0], np.sqrt(var[0])))
  prior = np.mean(windows, axis=0)
  np.testing.assert_allclose(features['prior'](clip)[0], prior, atol=1e-5)


def test_networks_saved_in_half_precision_compute_in_full(
  model, data, dataset, tmp_path_factory
):
  """On CPUs half precision ended in a traceback."""
  half = tmp_path_factory.mktemp('half')
  for name in ('vae', 'image_encoder'):
    config, params = bundle.load_component(model, name)
    params = {key: np.asarray(x, np.float16) for key, x in params.items()}
    bundle.save_component(half, name, config, params, {'source': 'test'})
  compute(half, data, '--features=latents,clip_embed', '--split=val')
  source = ClipSource(dataset, 'val')
  got = stored(data, source)
  frames = decode_frames(source[0])

  def encode(vae, pixels):
    return vae.encode(pixels)[0]

  vae = Component.load(half, 'vae', param_dtype=np.float32)
  latents = vae.stage(encode)(frames / np.float32(127.5) - 1)
  np.testing.assert_allclose(got['latents'](0), latents, atol=2e-3)
  assert len(got['clip_embed_5'](0)) == -(-len(frames) // 5)


def test_crops_are_stored_and_priors_are_made_from_them(
  networks, data, dataset, tmp_path, capsys
):
  folder = tmp_path / 'model'
  configs = {
    'embedder': tiny.EMBEDDER_OF_CROPS,
    'whisper': tiny.CONFIGS['whisper'],
  }
  tiny.save_components(folder, configs)
  flags = ['--split=train', '--features=crops_8']
  compute(folder, data, *flags, '--num_processes=2', '--process_id=1')
  assert 'not yet by the other processes' in capsys.readouterr().out
  compute(folder, data, *flags)

  source = ClipSource(dataset, 'train')
  crops = stored(data, source)['crops_8']
  assert crops.folder.name == f'crops_8-x{face_crops.ENLARGE}'
  assert len(shards(crops)) == 2
  for clip, record in enumerate(source):
    np.testing.assert_array_equal(crops(clip), face_crops.of_record(record, 8))
    assert len(crops(clip)) == record['num_frames']
    assert np.ptp(crops(clip)) > 50

  # A prior needs the crops, which are computed without being asked for.
  embedder = Component.load(folder, 'embedder')
  features = feature_extraction.FeatureExtractor(
    networks | {'embedder': embedder}, source, tmp_path / 'new', batch=4
  )
  prior = features.load_or_compute('prior')['prior']
  assert features.store.complete('crops_8', 'x1.2')
  states = features.load_or_compute('whisper')['whisper'](2)

  def expected(seen):
    return feature_extraction.gaussian(embedder, seen, states)

  np.testing.assert_allclose(prior(2)[0], expected(crops(2)), atol=1e-5)
  inverted = 255 - crops(2)
  assert np.abs(prior(2)[0] - expected(inverted)).max() > 1e-3


def test_eight_devices_and_two_processes_compute_the_same(
  model, data, dataset, whole, capsys
):
  compute(
    model, data, '--num_processes=2', '--process_id=1', '--batch=1', '--threads=1'
  )
  assert 'not yet by the other processes' in capsys.readouterr().out
  compute(model, data, '--num_processes=2', '--process_id=0', '--batch=2')
  assert capsys.readouterr().out.count('complete') == 8
  for split in ('train', 'val'):
    source = ClipSource(dataset, split)
    shared = stored(data, source)
    for name, feature in stored(whole, source).items():
      assert len(shards(shared[name])) == 2
      np.testing.assert_array_equal(shared[name].lengths, feature.lengths)
      for clip in range(len(source)):
        np.testing.assert_allclose(shared[name](clip), feature(clip), atol=4e-3)


# Every record takes a while, so that there is time to kill the run.
SLOW_RUN = """
import sys, time
from data_pipelines import precompute
from dicetalk_jax.data import clip_source, feature_store
feature_store.SHARD_CLIPS = 1
read = clip_source.ClipSource.__getitem__
clip_source.ClipSource.__getitem__ = lambda self, i: time.sleep(.5) or read(self, i)
precompute.main(sys.argv[1:])
"""


def test_a_run_after_a_killed_one_computes_only_what_is_missing(
  model, data, dataset, whole
):
  flags = ['--split=train', '--features=clip_embed', '--batch=1']
  command = [
    *[sys.executable, '-c', SLOW_RUN, *flags, '--threads=1'],
    *[f'--model={model}', f'--data={data}', f'--datasets={dataset}'],
  ]
  process = subprocess.Popen(
    command,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )

  def clips_in_shards():
    return [len(path.read_bytes()) // 16 for path in data.rglob('*.clips')]

  deadline = time.monotonic() + 300
  while not sum(clips_in_shards()):
    if process.poll() is not None or time.monotonic() > deadline:
      process.kill()
      pytest.fail(process.communicate()[0])
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  before = sum(clips_in_shards())
  assert 0 < before < 6

  compute(model, data, *flags)
  # The second run has added the missing clips as one shard.
  assert sorted(clips_in_shards()) == sorted([1] * before + [6 - before])
  source = ClipSource(dataset, 'train')
  feature = stored(data, source)['clip_embed_5']
  expected = stored(whole, source)['clip_embed_5']
  assert len(feature) == 6
  for clip in range(6):
    np.testing.assert_allclose(feature(clip), expected(clip), atol=4e-3)


def test_nothing_is_computed_twice(model, whole, monkeypatch):
  def fail(*_):
    raise AssertionError('computed again')

  monkeypatch.setattr(feature_extraction, '_batched', fail)
  compute(model, whole)


def test_bad_flags(model, data):
  def refused(sentence, *flags):
    with pytest.raises(ConfigError, match=sentence):
      compute(model, data, *flags)

  refused('colour is not known; choose some of latents,clip_embed', '--features=colour')
  refused('--batch must be at least 1, got 0', '--batch=0')
  refused(
    '--process_id=2 must be from 0 to 1',
    '--process_id=2',
    '--num_processes=2',
  )
  refused('counts the processes itself', '--multihost', '--num_processes=2')
  refused('invalid int value.*--help', '--batch=many')


def test_models_without_the_networks_are_refused(model, data, tmp_path):
  with pytest.raises(WeightsError, match='is not a model folder'):
    compute(data, data)
  without_vae = tmp_path / 'without_vae'
  without_both = tmp_path / 'without_both'
  for folder in (without_vae, without_both):
    folder.mkdir()
  tiny.model_without(model, without_vae, 'vae')
  tiny.model_without(without_vae, without_both, 'embedder')
  with pytest.raises(
    WeightsError,
    match='has no vae and no embedder; .* leave out latents,prior from --features',
  ):
    compute(without_both, data)


def test_bad_data_sets(model, data, tmp_path):
  with pytest.raises(DataError, match="no split 'nope'"):
    compute(model, data, '--split=nope')
  empty = tmp_path / 'empty'
  empty.mkdir()
  with pytest.raises(DataError, match='no prepared data set below'):
    precompute.main([f'--model={model}', f'--data={empty}'])
  with pytest.raises(DataError, match='is itself a data set; name it with --datasets'):
    precompute.main([f'--model={model}', f'--data={data}/set'])


@pytest.fixture(scope='module')
def no_pixels(tmp_path_factory):
  """A data set of one clip without pixels."""
  config = SyntheticConfig(
    train=1, val=0, test=0, clips=1, seconds=0.4, content='embedder'
  )
  return prepare_synthetic(tmp_path_factory.mktemp('no_pixels'), config, workers=1)


@pytest.mark.parametrize('feature', ['latents', 'crops_16'])
def test_features_of_pixels_are_refused_without_pixels(model, data, no_pixels, feature):
  with pytest.raises(
    DataError, match=f'no pixels, which {feature} is made from.*content=full'
  ):
    compute(
      model,
      data,
      f'--datasets={no_pixels}',
      '--split=train',
      f'--features={feature}',
    )

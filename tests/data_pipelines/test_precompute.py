"""Precomputation: stored values, devices, processes, a killed run, refusals."""

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
from dicetalk_jax.data.clip_record import decode_audio, decode_frames, encode_jpeg
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.feature_store import Feature
from dicetalk_jax.errors import ConfigError, DataError, WeightsError
from dicetalk_jax.media import audio, image
from dicetalk_jax.models import parameters, registry
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
EMBEDDER = dict(
  expr_dim=64,
  whisper_dim=8,
  whisper_states=2,
  width=6,
  heads=2,
  mlp_dim=8,
  visual_layers=1,
  audio_layers=1,
  fusion_layers=1,
  dropout=0.0,
  max_len=12,
)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp('model')
  configs = {
    name: tiny.CONFIGS[name] for name in ('vae', 'image_encoder', 'whisper')
  } | {'embedder': EMBEDDER}
  for name, config in configs.items():
    params = parameters.numpy_params(
      parameters.abstract(registry.builder(name, config))[1]
    )
    bundle.save_component(
      folder,
      name,
      registry.config_of(name, config).to_json(),
      params,
      {'source': 'test'},
    )
  return folder


@pytest.fixture(scope='module')
def nets(model):
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


def call(network, *inputs):
  return network(*inputs)


def run(model, data, *flags):
  precompute.main(
    [f'--model={model}', f'--data={data}', f'--datasets={data}/set', *flags]
  )


def stored(data, source):
  """Feature name -> feature."""
  return {
    path.name.rpartition('-')[0]: Feature(path)
    for path in (data / 'features' / source.fingerprint).iterdir()
  }


@pytest.fixture(scope='module')
def whole(model, dataset, tmp_path_factory):
  """All features, made in one run on one device."""
  folder = tmp_path_factory.mktemp('whole')
  (folder / 'set').symlink_to(dataset)
  devices = jax.local_devices()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'local_devices', lambda: devices[:1])
    run(model, folder, '--batch=4')
  return folder


def test_each_feature_is_what_its_network_says(nets, dataset, whole):
  source = ClipSource(dataset, 'train')
  got = stored(whole, source)
  assert set(got) == {'latents', 'clip_embed_5', 'whisper', 'prior'}
  assert {name: feature(0).dtype.name for name, feature in got.items()} == {
    'latents': 'float16',
    'clip_embed_5': 'float16',
    'whisper': 'float16',
    'prior': 'float32',
  }
  assert all(list(feature.lengths >= 0) == [True] * 6 for feature in got.values())

  def encode(vae, pixels):
    return vae.encode(pixels)[0]

  clip = 4  # its rows are in several batches
  record = source[clip]
  n, frames = record['num_frames'], decode_frames(record)
  latents = nets['vae'].stage(encode)(frames / np.float32(127.5) - 1)
  np.testing.assert_allclose(got['latents'](clip), latents, atol=2e-3)
  pixels = np.stack([image.clip_pixels(frame, 28) for frame in frames[::5]])
  np.testing.assert_allclose(
    got['clip_embed_5'](clip), nets['image_encoder'].stage(call)(pixels), atol=2e-3
  )
  states = np.asarray(nets['whisper'].stage(call)(audio.log_mel(decode_audio(record))))[
    0, : 2 * n
  ]
  np.testing.assert_allclose(got['whisper'](clip), states, atol=4e-3)
  half, there = -(-n // 2), np.ones(1, bool)
  assert 12 < n <= 24  # a clip that is longer than `max_len`: the mean of two windows
  halves = [
    nets['embedder'].stage(call)(
      record['expression'][None, rows],
      got['whisper'](clip)[None, 2 * rows.start : 2 * rows.stop],
      np.ones((1, rows.stop - rows.start), bool),
      there,
      there,
    )
    for rows in (slice(0, half), slice(half, n))
  ]
  want = np.mean([(mu[0], np.sqrt(var[0])) for mu, var in halves], axis=0)
  np.testing.assert_allclose(got['prior'](clip)[0], want, atol=1e-5)


def test_networks_saved_in_half_precision_compute_in_full(
  model, data, dataset, tmp_path_factory
):
  """On CPUs half precision ended in a traceback."""
  half = tmp_path_factory.mktemp('half')
  for name in ('vae', 'image_encoder'):
    config, params = bundle.load_component(model, name)
    params = {key: np.asarray(x, np.float16) for key, x in params.items()}
    bundle.save_component(half, name, config, params, {'source': 'test'})
  run(half, data, '--features=latents,clip_embed', '--split=val')
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
  model, nets, data, dataset, tmp_path_factory, capsys
):
  folder = tmp_path_factory.mktemp('seeing')
  for name, config in (
    ('embedder', EMBEDDER | dict(visual='crops', crop_size=8, crop_channels=(4,))),
    ('whisper', tiny.CONFIGS['whisper']),
  ):
    params = (
      nets[name].params
      if name == 'whisper'
      else parameters.numpy_params(
        parameters.abstract(registry.builder(name, config))[1]
      )
    )
    bundle.save_component(
      folder,
      name,
      registry.config_of(name, config).to_json(),
      params,
      {'source': 'test'},
    )
  run(
    folder,
    data,
    '--split=train',
    '--features=crops_8',
    '--num_processes=2',
    '--process_id=1',
  )
  assert 'not yet by the other processes' in capsys.readouterr().out
  run(folder, data, '--split=train', '--features=crops_8')
  source = ClipSource(dataset, 'train')
  stored_crops = stored(data, source)['crops_8']
  assert (
    stored_crops.folder.name == f'crops_8-x{face_crops.ENLARGE}'
    and len(list(stored_crops.folder.glob('*.npy'))) == 2
  )
  for clip, record in enumerate(source):
    np.testing.assert_array_equal(stored_crops(clip), face_crops.of_record(record, 8))
    assert (
      len(stored_crops(clip)) == record['num_frames']
      and np.ptp(stored_crops(clip)) > 50
    )
  embedder = Component.load(folder, 'embedder')
  features = feature_extraction.FeatureExtractor(
    nets | {'embedder': embedder}, source, tmp_path_factory.mktemp('new')
  )
  prior = features.load_or_compute('prior')[
    'prior'
  ]  # and, unasked, what it is made from
  assert features.store.complete('crops_8', 'x1.2')
  states = features.load_or_compute('whisper')['whisper'](2)
  np.testing.assert_allclose(
    prior(2)[0],
    feature_extraction.gaussian(embedder, stored_crops(2), states),
    atol=1e-5,
  )
  assert (
    np.abs(
      prior(2)[0] - feature_extraction.gaussian(embedder, 255 - stored_crops(2), states)
    ).max()
    > 1e-3
  )


def test_eight_devices_and_two_processes_give_the_same(
  model, data, dataset, whole, capsys
):
  run(model, data, '--num_processes=2', '--process_id=1', '--batch=1', '--threads=1')
  assert 'not yet by the other processes' in capsys.readouterr().out
  run(model, data, '--num_processes=2', '--process_id=0', '--batch=2')
  assert capsys.readouterr().out.count('complete') == 8
  for split in ('train', 'val'):
    source = ClipSource(dataset, split)
    one, shared = stored(whole, source), stored(data, source)
    for name, feature in one.items():
      assert len(list(shared[name].folder.glob('*.npy'))) == 2
      np.testing.assert_array_equal(shared[name].lengths, feature.lengths)
      for clip in range(len(source)):
        np.testing.assert_allclose(shared[name](clip), feature(clip), atol=4e-3)


# Every record takes a while, so that there is time to kill the run.
SLOW = """
import sys, time
from data_pipelines import precompute
from dicetalk_jax.data import clip_source, feature_store
feature_store.SHARD_CLIPS = 1
read = clip_source.ClipSource.__getitem__
clip_source.ClipSource.__getitem__ = lambda self, i: time.sleep(.5) or read(self, i)
precompute.main(sys.argv[1:])
"""


def test_a_killed_run_repeats_no_shard(model, data, dataset, whole):
  flags = [
    f'--model={model}',
    f'--data={data}',
    '--split=train',
    '--features=clip_embed',
    '--batch=1',
    '--threads=1',
  ]
  env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  process = subprocess.Popen(
    [sys.executable, '-c', SLOW, *flags, f'--datasets={dataset}'],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  deadline = time.monotonic() + 300

  def done():
    return [len(path.read_bytes()) // 16 for path in data.rglob('*.clips')]

  while not sum(done()):
    assert process.poll() is None and time.monotonic() < deadline, (
      process.communicate()[0]
    )
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  before = sum(done())
  assert 0 < before < 6
  run(model, data, '--split=train', '--features=clip_embed', '--batch=1')
  # The second run added only what was missing, as one shard.
  assert sorted(done()) == sorted([1] * before + [6 - before])
  source = ClipSource(dataset, 'train')
  feature, want = (
    stored(data, source)['clip_embed_5'],
    stored(whole, source)['clip_embed_5'],
  )
  assert len(feature) == 6
  for clip in range(6):
    np.testing.assert_allclose(feature(clip), want(clip), atol=4e-3)


def test_nothing_is_computed_twice(model, whole, monkeypatch):
  def fail(*_):
    raise AssertionError('computed again')

  monkeypatch.setattr(feature_extraction, '_batched', fail)
  run(model, whole)


def test_rows_share_batches():
  seen = []

  def apply(rows):
    seen.append(rows.copy())
    return rows * 2

  lengths = [3, 0, 9, 1, 4]
  items = [(clip, np.full((n, 2), clip + 1)) for clip, n in enumerate(lengths)]
  out = dict(feature_extraction._batched(apply, 4, iter(items)))
  assert {clip: rows.tolist() for clip, rows in out.items()} == {
    clip: (rows * 2).tolist() for clip, rows in items
  }
  assert [len(rows) for rows in seen] == [4] * 5 and not seen[-1][1:].any()
  silent = dict(feature_extraction._batched(apply, 4, iter([(7, np.zeros((0, 2)))])))
  assert silent[7].shape == (0, 2)


class Clips:
  """Two clips in memory: 31 s of audio, and silence."""

  split, fingerprint, made_by, expression_dim = 'train', 'x', {}, 64
  lengths = (775, 5)

  def __len__(self):
    return 2

  @property
  def table(self):
    return type(
      'Table',
      (),
      {'num_frames': np.array(self.lengths), 'clip_id': np.array(['long', 'silent'])},
    )

  def __getitem__(self, i):
    sound = np.random.default_rng(0).integers(-9999, 9999, (640 * 775, 0)[i])
    return {
      'audio': sound.astype(np.int16),
      'num_frames': self.lengths[i],
      'frames': [],
      'expression': np.ones((self.lengths[i], 64)),
    }


def test_long_audio_is_read_in_windows_and_silence_has_no_rows(nets, tmp_path):
  features = feature_extraction.FeatureExtractor(
    nets, Clips(), tmp_path, batch=2
  ).load_or_compute('whisper', 'prior')
  assert list(features['whisper'].lengths) == [1550, 0]
  mel = audio.log_mel(decode_audio(Clips()[0]))
  states = np.asarray(nets['whisper'].stage(call)(mel)).reshape(3000, 2, 8)[:1550]
  np.testing.assert_allclose(features['whisper'](0), states, atol=4e-3)
  assert np.isfinite(features['prior'](1)).all()


class Unseen(Clips):
  """Without expressions, though the records have room for as many as MediaPipe
  gives.
  """

  expression_dim = 0

  def __getitem__(self, i):
    return super().__getitem__(i) | {'expression': np.zeros((0, 51), np.float32)}


def test_priors_of_clips_without_expressions_are_those_of_their_audio(nets, tmp_path):
  features = feature_extraction.FeatureExtractor(
    nets, Unseen(), tmp_path, batch=2
  ).load_or_compute('whisper', 'prior')
  want = feature_extraction.gaussian(
    nets['embedder'], np.zeros((0, 64), np.float32), features['whisper'](0)
  )
  np.testing.assert_allclose(features['prior'](0)[0], want, atol=1e-5)


def test_expressions_of_another_width_are_refused(nets, tmp_path):
  wide = Clips()
  wide.expression_dim = 51
  features = feature_extraction.FeatureExtractor(nets, wide, tmp_path)
  for refuse in (features.check, features.compute_missing):
    with pytest.raises(
      DataError,
      match='have 51 expression coefficients per frame, but the embedder reads 64; ',
    ):
      refuse('prior')
  assert not list(tmp_path.rglob('*.npy'))  # nothing was computed before


class Seen(Clips):
  """The second clip has pixels, the first has none."""

  def __getitem__(self, i):
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    return super().__getitem__(i) | {
      'frames': [encode_jpeg(pixels)] * 5 * i,
      'bbox': np.tile([0.25, 0.25, 0.75, 0.75], (self.lengths[i], 1)),
    }


def test_clips_without_pixels_have_no_crops(tmp_path):
  assert list(
    feature_extraction.FeatureExtractor({}, Seen(), tmp_path)
    .load_or_compute('crops_8')['crops_8']
    .lengths
  ) == [0, 5]
  with pytest.raises(
    DataError, match='no pixels, which crops_16 is made from.*content=full'
  ):
    feature_extraction.FeatureExtractor({}, Clips(), tmp_path).load_or_compute(
      'crops_16'
    )


class Complete(Clips):
  """Clips whose records carry all but the prior, and no pixels."""

  def __getitem__(self, i):
    n = self.lengths[i]
    return super().__getitem__(i) | {
      'latents': np.ones((n, 2, 2, 4)),
      'whisper': np.ones((2 * n, 2, 8), np.float16),
    }


def test_features_in_the_records_are_not_computed(nets, tmp_path):
  features = feature_extraction.FeatureExtractor(nets, Complete(), tmp_path, batch=2)
  assert (
    features.compute_missing('latents')
    and features.load_or_compute('latents', 'whisper') == {}
  )
  prior = features.load_or_compute('latents', 'whisper', 'prior')['prior']
  n, there = 5, np.ones(1, bool)
  mu, _ = nets['embedder'].stage(call)(
    np.ones((1, n, 64)), np.ones((1, 2 * n, 2, 8)), np.ones((1, n), bool), there, there
  )
  np.testing.assert_allclose(prior(1)[0, 0], mu[0], atol=1e-5)
  with pytest.raises(DataError, match='no pixels, which clip_embed is made from'):
    features.compute_missing('clip_embed')


def test_values_that_are_not_finite_are_refused(model, tmp_path):
  params = {
    name: value + np.float32(1e6)
    for name, value in Component.load(model, 'whisper').params.items()
  }
  broken = Component.load(model, 'whisper')
  broken.params.update(params)
  with pytest.raises(
    DataError,
    match='whisper of clip long is not finite in float16; check the clip and the '
    'weights',
  ):
    feature_extraction.FeatureExtractor(
      {'whisper': broken}, Clips(), tmp_path, batch=2
    ).compute_missing('whisper')


def test_refusals(model, data, tmp_path_factory):
  def refused(error, sentence, *flags, model=model, data=data):
    with pytest.raises(error, match=sentence):
      run(model, data, *flags)

  refused(
    ConfigError,
    'colour is not known; choose some of latents,clip_embed',
    '--features=colour',
  )
  refused(ConfigError, '--batch must be at least 1, got 0', '--batch=0')
  refused(
    ConfigError,
    '--process_id=2 must be from 0 to 1',
    '--process_id=2',
    '--num_processes=2',
  )
  refused(
    ConfigError, 'counts the processes itself', '--multihost', '--num_processes=2'
  )
  refused(ConfigError, 'invalid int value.*--help', '--batch=many')
  refused(DataError, "no split 'nope'", '--split=nope')
  refused(WeightsError, 'is not a model folder', model=data)
  few = tmp_path_factory.mktemp('few')
  (few / 'index').mkdir()
  bare = tiny.model_without(
    tiny.model_without(model, few / 'index', 'vae'), few, 'embedder'
  )
  refused(
    WeightsError,
    'has no vae and no embedder; .* leave out latents,prior from --features',
    model=bare,
  )
  with pytest.raises(DataError, match='no prepared data set below'):
    precompute.main([f'--model={model}', f'--data={tmp_path_factory.mktemp("empty")}'])
  with pytest.raises(DataError, match='is itself a data set; name it with --datasets'):
    precompute.main([f'--model={model}', f'--data={data}/set'])
  no_pixels = prepare_synthetic(
    data,
    SyntheticConfig(train=1, val=0, test=0, clips=1, seconds=0.4, content='embedder'),
    workers=1,
  )
  for feature in ('latents', 'crops_16'):
    refused(
      DataError,
      f'no pixels, which {feature} is made from.*content=full',
      f'--datasets={no_pixels}',
      '--split=train',
      f'--features={feature}',
    )

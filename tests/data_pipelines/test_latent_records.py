"""Data sets without pixels give the same batches as the data set they come from."""

import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from data_pipelines import precompute, prepare
from data_pipelines.builders import latent_records
from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import SyntheticConfig
from dicetalk_jax import bundle
from dicetalk_jax.component import Component
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.diffusion_loader import diffusion_loader
from dicetalk_jax.data.embedder_loader import embedder_loader
from dicetalk_jax.data.feature_extraction import FeatureExtractor
from dicetalk_jax.data.feature_store import FeatureStore
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError
from tests import tiny

WINDOWS = dict(batch=6, frames=4, step=2, mask_size=16, seed=3, clip_stride=5)
SPLITS = ('train', 'val')
FEATURES = '--features=crops_8,prior'  # next to those that the records carry


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp('model')
  configs = tiny.FEATURE_CONFIGS | {'embedder': tiny.EMBEDDER_OF_CROPS}
  tiny.save_components(folder, configs)
  return folder


@pytest.fixture(scope='module')
def networks(model):
  return {name: Component.load(model, name) for name in bundle.components(model)}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A root with one data set: two emotions of each person have two clips."""
  folder = tmp_path_factory.mktemp('data')
  config = SyntheticConfig(
    size=16, train=2, val=1, test=1, clips=10, seconds=0.7, levels=(1, 3)
  )
  prepare_synthetic(folder, config, workers=1)
  return folder


def compute(model, data, *flags):
  precompute.main([f'--model={model}', f'--data={data}', *flags])


def packed_below(root):
  """The folders of the data sets without pixels."""
  return list(root.glob('packed/*/1.0.0'))


@pytest.fixture(scope='module')
def full(data):
  """The data set with pixels."""
  return next(data.glob('synthetic/*/1.0.0'))


@pytest.fixture(scope='module')
def root(model, data, tmp_path_factory):
  """A root with the data set without pixels, made together with the features."""
  root = tmp_path_factory.mktemp('root')
  devices = jax.local_devices()
  with pytest.MonkeyPatch.context() as patch:
    # Programs for one device compile faster.
    patch.setattr(jax, 'local_devices', lambda: devices[:1])
    compute(model, data, f'--records={root}', FEATURES, '--batch=10')
  return root


@pytest.fixture(scope='module')
def packed(root):
  """The data set without pixels."""
  (folder,) = packed_below(root)
  return folder


@pytest.fixture
def nothing_is_computed(monkeypatch):
  def fail(*_):
    raise AssertionError('computed')

  monkeypatch.setattr(FeatureExtractor, '_rows', fail)


def parts_with(features, networks, folder, root):
  """Both splits of a data set, with features that are stored below a root."""
  parts = []
  for split in SPLITS:
    source = ClipSource(folder, split)
    extractor = FeatureExtractor(networks, source, root / 'features')
    parts.append(DatasetPart(source, extractor.load_or_compute(*features)))
  return parts


def diffusion_parts(networks, folder, root):
  features = ['latents', 'clip_embed', 'whisper', 'prior']
  return parts_with(features, networks, folder, root)


def assert_same_batches(left, right, count=6):
  for a, b in itertools.islice(zip(left, right, strict=True), count):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name].dtype == b[name].dtype
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(
  'settings',
  [{}, dict(reference='identity', emotion='other_clip', measured_buckets=False)],
)
@pytest.mark.usefixtures('nothing_is_computed')
def test_diffusion_training_gets_the_same_batches(
  networks, data, full, root, packed, settings
):
  have = diffusion_parts(networks, packed, root)
  want = diffusion_parts(networks, full, data)
  assert all(set(part.features) == {'prior'} for part in have)
  assert len(want[0].features) == 4

  def batches(parts, **more):
    return diffusion_loader(parts, **WINDOWS, **settings, **more)

  for ours, theirs in zip(have, want, strict=True):
    assert_same_batches(batches(ours), batches(theirs))
  assert_same_batches(batches(have, shard=(1, 2)), batches(want, shard=(1, 2)))
  # Batches are not equal for want of content.
  batch = next(iter(diffusion_loader(have, **WINDOWS)))
  for rows in batch.values():
    assert np.ptp(rows, axis=0).any()


@pytest.mark.parametrize(
  'visual, features',
  [('expression', ['whisper']), ('crops_8', ['whisper', 'crops_8'])],
)
@pytest.mark.usefixtures('nothing_is_computed')
def test_embedder_training_gets_the_same_batches(
  networks, data, full, root, packed, visual, features
):
  have = parts_with(features, networks, packed, root)
  want = parts_with(features, networks, full, data)
  assert all('whisper' not in part.features for part in have)

  def batches(parts):
    return embedder_loader(
      parts[0],
      identities=2,
      emotions=3,
      clips=2,
      min_len=4,
      max_len=12,
      seed=0,
      visual=visual,
    )

  assert_same_batches(batches(have), batches(want))


def test_the_records_are_those_of_the_other_set_without_frames(
  networks, data, full, packed
):
  for part in diffusion_parts(networks, full, data):
    want = part.source
    have = ClipSource(packed, want.split)
    assert len(have) == len(want) > 0
    assert have.motion_medians == want.motion_medians
    assert have.metadata['settings'] == want.metadata['settings']
    for name in vars(want.table):
      np.testing.assert_array_equal(
        getattr(have.table, name), getattr(want.table, name), err_msg=name
      )
    for clip, (a, b) in enumerate(zip(have, want)):
      assert set(b) - set(a) == {'frames'}
      assert set(a) < set(b)
      stored = {name: part.features[name](clip) for name in latent_records.BLOCKS}
      for name, value in {**b, **stored}.items():
        if name != 'frames':
          assert np.asarray(a[name]).dtype == np.asarray(value).dtype, name
          np.testing.assert_array_equal(a[name], value, err_msg=name)
      frames = int(a['num_frames'])
      rows = [len(a[name]) for name in latent_records.BLOCKS]
      assert rows == [frames, -(-frames // 5), 2 * frames]
      assert a['has_video']
      assert a['has_audio']


def test_a_split_that_is_not_packed_is_missing(packed):
  with pytest.raises(DataError, match="no split 'test'"):
    ClipSource(packed, 'test')


@pytest.mark.usefixtures('nothing_is_computed')
def test_the_same_command_finds_the_data_set_again(
  model, data, root, packed, capsys, monkeypatch
):
  def fail(*_):
    raise AssertionError('written again')

  monkeypatch.setattr(latent_records.Packed, '_generate_examples', fail)
  compute(model, data, f'--records={root}', FEATURES)
  assert capsys.readouterr().out.splitlines()[-1] == str(packed)


def test_an_interrupted_data_set_does_not_appear(
  model, data, root, packed, tmp_path, monkeypatch
):
  rows = DatasetPart.rows
  calls = itertools.count()

  def interrupted_rows(*args):
    if next(calls) > 20:
      raise KeyboardInterrupt
    return rows(*args)

  with monkeypatch.context() as patch:
    patch.setattr(DatasetPart, 'rows', interrupted_rows)
    with pytest.raises(KeyboardInterrupt):
      compute(model, data, f'--records={tmp_path}', FEATURES)
  assert not packed_below(tmp_path)
  assert not (tmp_path / 'features').exists()

  compute(model, data, f'--records={tmp_path}', FEATURES)
  for split in SPLITS:
    again = ClipSource(tmp_path / packed.relative_to(root), split)
    first = ClipSource(packed, split)
    assert again.fingerprint == first.fingerprint
    assert (again.table.clip_id == first.table.clip_id).all()


def test_a_retrained_embedder_gives_its_own_priors(networks, data, full, root, packed):
  other = {'embedder': tiny.component('embedder', tiny.EMBEDDER)}
  have = diffusion_parts(networks | other, packed, root)
  want = diffusion_parts(networks | other, full, data)
  old = diffusion_parts(networks, packed, root)
  for a, b, c in zip(have, want, old):
    for clip in range(len(a.source)):
      prior = a.features['prior'](clip)
      np.testing.assert_allclose(prior, b.features['prior'](clip), atol=1e-5)
      assert np.abs(prior - c.features['prior'](clip)).max() > 1e-3


@pytest.mark.usefixtures('nothing_is_computed')
def test_a_data_set_without_pixels_can_be_packed_again(
  model, networks, root, packed, tmp_path
):
  compute(model, root, f'--records={tmp_path}', '--features=prior')
  (folder,) = packed_below(tmp_path)
  have = diffusion_parts(networks, folder, tmp_path)
  want = diffusion_parts(networks, packed, root)
  assert_same_batches(
    diffusion_loader(have, **WINDOWS), diffusion_loader(want, **WINDOWS), count=2
  )


def test_stored_features_follow_the_clips_in_any_order(full, tmp_path):
  source = ClipSource(full, 'train')
  clips = list(range(len(source)))
  prior = FeatureStore(tmp_path, 'pixels').write(
    'prior', 'x', [(clip, np.full((1, 2), clip)) for clip in clips]
  )
  reversed_source = SimpleNamespace(
    table=SimpleNamespace(clip_id=source.table.clip_id[::-1]), fingerprint='reversed'
  )
  latent_records._copy(prior, source, tmp_path, reversed_source)
  copied = FeatureStore(tmp_path / 'features', 'reversed').read('prior', 'x')
  assert [int(copied(clip)[0, 0]) for clip in clips] == clips[::-1]


def test_records_of_another_stride_are_refused(networks, root, packed):
  source = ClipSource(packed, 'train')
  extractor = FeatureExtractor(networks, source, root / 'features', clip_stride=4)
  with pytest.raises(
    DataError, match='carry clip_embed_5-.*ask for clip_embed_4-.*use those that'
  ):
    extractor.load_or_compute('clip_embed')
  with pytest.raises(
    DataError,
    match='clip_embed in the records of .* rows in the first clip, .* use the '
    'clip_stride',
  ):
    settings = WINDOWS | dict(clip_stride=1)
    diffusion_loader(DatasetPart(source), **settings, emotion='none')


def test_records_of_another_network_are_refused(networks, root, packed):
  vae = networks['vae']
  params = {name: value + 1 for name, value in vae.params.items()}
  other = Component(vae.config, vae.graphdef, params)
  extractor = FeatureExtractor(
    networks | {'vae': other}, ClipSource(packed, 'train'), root / 'features'
  )
  with pytest.raises(
    DataError,
    match=f'carry latents-{vae.fingerprint}, but .* for latents-{other.fingerprint}',
  ):
    extractor.load_or_compute('latents')


def test_a_clip_that_diffusion_cannot_read_is_refused(
  networks, data, full, tmp_path, monkeypatch
):
  extractor = FeatureExtractor(networks, ClipSource(full, 'train'), data / 'features')
  features = extractor.load_or_compute('latents', 'clip_embed', 'whisper')
  features['whisper'].lengths[3] = 0  # as of a clip without audio
  monkeypatch.setattr(FeatureExtractor, 'load_or_compute', lambda *_: features)
  with pytest.raises(DataError, match='whisper of clip .* has 0 rows'):
    latent_records.prepare_packed(tmp_path, [extractor])
  assert not list(tmp_path.iterdir())


def test_places_that_cannot_hold_records_are_refused(model, data, tmp_path):
  def refused(sentence, *flags):
    with pytest.raises(ConfigError, match=sentence):
      compute(model, data, *flags)

  place = tmp_path / 'records'
  single = '--records needs a single process'
  refused(single, f'--records={place}', '--num_processes=2')
  refused(single, f'--records={place}', '--multihost')
  assert not place.exists()
  inside = data / 'records'
  refused('lies in --data=.* name a folder outside', f'--records={inside}')
  assert not inside.exists()
  refused('must be on a disk', '--records=gs://bucket/records')


def test_a_data_set_without_pixels_and_features_is_refused(model, data, tmp_path):
  config = SyntheticConfig(
    size=16, train=1, val=0, test=0, clips=1, seconds=0.4, content='embedder'
  )
  no_pixels = prepare_synthetic(tmp_path / 'data', config, workers=1)
  place = tmp_path / 'records'
  with pytest.raises(
    DataError, match='no pixels, which latents is made from.*content=full'
  ):
    compute(
      model,
      data,
      f'--records={place}',
      f'--datasets={no_pixels}',
      '--split=train',
      '--features=whisper',
    )
  assert not list(place.iterdir())


@pytest.mark.parametrize('corpus', ['synthetic', 'mead'])
def test_preparation_does_not_offer_latents(corpus, tmp_path, capsys):
  with pytest.raises(ConfigError, match="invalid choice: 'latents'"):
    prepare.main([corpus, f'--out={tmp_path}', '--content=latents'])
  with pytest.raises(SystemExit):
    prepare.main([corpus, '--help'])
  usage = ' '.join(capsys.readouterr().out.split())
  assert 'data_pipelines.precompute --records' in usage

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
from dicetalk_jax.data import feature_extraction
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.diffusion_loader import diffusion_loader
from dicetalk_jax.data.embedder_loader import embedder_loader
from dicetalk_jax.data.feature_store import FeatureStore
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError
from dicetalk_jax.models import parameters, registry
from tests import tiny

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
  max_len=24,
)
FRAMES = dict(batch=6, frames=4, step=2, mask_size=16, seed=3, clip_stride=5)
SPLITS = ('train', 'val')


def save(folder, name, config):
  params = parameters.numpy_params(
    parameters.abstract(registry.builder(name, config))[1]
  )
  bundle.save_component(
    folder, name, registry.config_of(name, config).to_json(), params, {'source': 'test'}
  )


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp('model')
  for name, config in {
    **{name: tiny.CONFIGS[name] for name in ('vae', 'image_encoder', 'whisper')},
    'embedder': EMBEDDER | dict(visual='crops', crop_size=8, crop_channels=(4,)),
  }.items():
    save(folder, name, config)
  return folder


@pytest.fixture(scope='module')
def nets(model):
  return {name: Component.load(model, name) for name in bundle.components(model)}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A root with one data set: two emotions of each person have two clips."""
  folder = tmp_path_factory.mktemp('data')
  prepare_synthetic(
    folder,
    SyntheticConfig(
      size=16, train=2, val=1, test=1, clips=10, seconds=0.7, levels=(1, 3)
    ),
    workers=1,
  )
  return folder


def run(model, data, *flags):
  precompute.main([f'--model={model}', f'--data={data}', *flags])


@pytest.fixture(scope='module')
def full(data):
  return next(data.glob('synthetic/*/1.0.0'))


@pytest.fixture(scope='module')
def made(model, data, tmp_path_factory):
  """A root with the data set without pixels, made together with the features."""
  root, devices = tmp_path_factory.mktemp('pod'), jax.local_devices()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'local_devices', lambda: devices[:1])  # quicker to compile for
    run(model, data, f'--records={root}', '--features=crops_8,prior')
  return root


@pytest.fixture(scope='module')
def folder(made):
  return next(made.glob('packed/*/1.0.0'))


@pytest.fixture
def nothing_is_computed(monkeypatch):
  def fail(*_):
    raise AssertionError('computed')

  monkeypatch.setattr(feature_extraction.FeatureExtractor, '_rows', fail)


def parts(nets, folder, root, *names):
  sources = [ClipSource(folder, split) for split in SPLITS]
  return [
    DatasetPart(
      source,
      feature_extraction.FeatureExtractor(
        nets, source, root / 'features'
      ).load_or_compute(*names),
    )
    for source in sources
  ]


def diffusion_parts(nets, folder, root):
  return parts(nets, folder, root, 'latents', 'clip_embed', 'whisper', 'prior')


def assert_same(left, right, batches=6):
  for a, b in itertools.islice(zip(left, right, strict=True), batches):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name].dtype == b[name].dtype
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(
  'how', ({}, dict(reference='identity', emotion='other_clip', measured_buckets=False))
)
def test_diffusion_training_gets_the_same_batches(
  nets, data, full, made, folder, how, nothing_is_computed
):
  have, want = diffusion_parts(nets, folder, made), diffusion_parts(nets, full, data)
  assert (
    all(set(part.features) == {'prior'} for part in have) and len(want[0].features) == 4
  )
  for i, _ in enumerate(SPLITS):
    assert_same(*(diffusion_loader(p[i], **FRAMES, **how) for p in (have, want)))
  assert_same(
    *(diffusion_loader(p, **FRAMES, **how, shard=(1, 2)) for p in (have, want))
  )
  batch = next(iter(diffusion_loader(have, **FRAMES)))
  assert all(
    np.ptp(batch[name], axis=0).any() for name in batch
  )  # equal, and not because there is nothing


@pytest.mark.parametrize('visual', ('expression', 'crops_8'))
def test_embedder_training_gets_the_same_batches(
  nets, data, full, made, folder, visual, nothing_is_computed
):
  names = ['whisper'] + ['crops_8'] * (visual == 'crops_8')
  have, want = parts(nets, folder, made, *names), parts(nets, full, data, *names)
  assert all('whisper' not in part.features for part in have)
  how = dict(
    identities=2, emotions=3, clips=2, min_len=4, max_len=12, seed=0, visual=visual
  )
  assert_same(*(embedder_loader(p[0], **how) for p in (have, want)))


def test_the_records_are_those_of_the_other_set(nets, data, full, folder):
  stored = diffusion_parts(nets, full, data)
  for split, part in zip(SPLITS, stored):
    have, want = ClipSource(folder, split), part.source
    for name in vars(want.table):
      np.testing.assert_array_equal(
        getattr(have.table, name), getattr(want.table, name), err_msg=name
      )
    assert have.motion_medians == want.motion_medians and len(have) == len(want) > 0
    assert have.metadata['settings'] == want.metadata['settings']
    for clip, (a, b) in enumerate(zip(have, want)):
      assert set(b) - set(a) == {'frames'} and set(a) < set(b)
      for name in a:
        value = part.features[name](clip) if name in latent_records.BLOCKS else b[name]
        assert np.asarray(a[name]).dtype == np.asarray(value).dtype, name
        np.testing.assert_array_equal(a[name], value, err_msg=name)
      n = int(a['num_frames'])
      assert (
        [len(a[name]) for name in latent_records.BLOCKS] == [n, -(-n // 5), 2 * n]
        and a['has_video']
        and a['has_audio']
      )
  with pytest.raises(DataError, match="no split 'test'"):
    ClipSource(folder, 'test')


def test_the_same_command_finds_the_data_set_again(
  model, data, made, folder, capsys, nothing_is_computed, monkeypatch
):
  def fail(*_):
    raise AssertionError('written again')

  monkeypatch.setattr(latent_records.Packed, '_generate_examples', fail)
  run(model, data, f'--records={made}', '--features=crops_8,prior')
  assert capsys.readouterr().out.splitlines()[-1] == str(folder)


def test_an_interrupted_data_set_does_not_appear(
  model, data, made, folder, tmp_path, monkeypatch
):
  rows, calls = DatasetPart.rows, itertools.count()

  def dying(*args):
    if next(calls) > 20:
      raise KeyboardInterrupt
    return rows(*args)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(DatasetPart, 'rows', dying)
    run(model, data, f'--records={tmp_path}', '--features=crops_8,prior')
  assert (
    not list(tmp_path.glob('packed/*/1.0.0')) and not (tmp_path / 'features').exists()
  )
  run(model, data, f'--records={tmp_path}', '--features=crops_8,prior')
  for split in SPLITS:
    again, one = (
      ClipSource(root / folder.relative_to(made), split) for root in (tmp_path, made)
    )
    assert (
      again.fingerprint == one.fingerprint
      and (again.table.clip_id == one.table.clip_id).all()
    )


def test_a_retrained_embedder_gives_its_own_priors(
  nets, data, full, made, folder, tmp_path
):
  save(tmp_path, 'embedder', EMBEDDER)
  retrained = nets | {'embedder': Component.load(tmp_path, 'embedder')}
  have, want = (
    diffusion_parts(retrained, folder, made),
    diffusion_parts(retrained, full, data),
  )
  old = diffusion_parts(nets, folder, made)
  for a, b, c in zip(have, want, old):
    for clip in range(len(a.source)):
      np.testing.assert_allclose(
        a.features['prior'](clip), b.features['prior'](clip), atol=1e-5
      )
      assert np.abs(a.features['prior'](clip) - c.features['prior'](clip)).max() > 1e-3


def test_it_can_be_packed_again(
  model, made, folder, tmp_path, nets, nothing_is_computed
):
  run(model, made, f'--records={tmp_path}', '--features=prior')
  have = diffusion_parts(nets, next(tmp_path.glob('packed/*/1.0.0')), tmp_path)
  assert_same(
    *(
      diffusion_loader(p, **FRAMES) for p in (have, diffusion_parts(nets, folder, made))
    ),
    batches=2,
  )


def test_side_files_follow_the_clips_whatever_their_order(full, tmp_path):
  source = ClipSource(full, 'train')
  prior = FeatureStore(tmp_path, 'pixels').write(
    'prior', 'x', [(k, np.full((1, 2), k)) for k in range(len(source))]
  )
  turned = SimpleNamespace(
    table=SimpleNamespace(clip_id=source.table.clip_id[::-1]), fingerprint='turned'
  )
  latent_records._copy(prior, source, tmp_path, turned)
  copied = FeatureStore(tmp_path / 'features', 'turned').read('prior', 'x')
  assert [int(copied(k)[0, 0]) for k in range(len(source))] == [*range(len(source))][
    ::-1
  ]


def test_other_networks_and_strides_are_refused(nets, made, folder):
  source = ClipSource(folder, 'train')
  with pytest.raises(
    DataError, match='carry clip_embed_5-.*ask for clip_embed_4-.*use those that'
  ):
    feature_extraction.FeatureExtractor(
      nets, source, made / 'features', clip_stride=4
    ).load_or_compute('clip_embed')
  vae = nets['vae']
  other = Component(
    vae.config, vae.graphdef, {name: value + 1 for name, value in vae.params.items()}
  )
  with pytest.raises(
    DataError,
    match=f'carry latents-{vae.fingerprint}, but .* for latents-{other.fingerprint}',
  ):
    feature_extraction.FeatureExtractor(
      nets | {'vae': other}, source, made / 'features'
    ).load_or_compute('latents')
  with pytest.raises(
    DataError,
    match='clip_embed in the records of .* rows in the first clip, .* use the '
    'clip_stride',
  ):
    diffusion_loader(DatasetPart(source), **FRAMES | {'clip_stride': 1}, emotion='none')


def test_a_clip_that_diffusion_cannot_read_is_refused(
  nets, data, full, tmp_path, monkeypatch
):
  job = feature_extraction.FeatureExtractor(
    nets, ClipSource(full, 'train'), data / 'features'
  )
  ready = job.load_or_compute('latents', 'clip_embed', 'whisper')
  ready['whisper'].lengths[3] = 0  # as of a clip without audio
  monkeypatch.setattr(
    feature_extraction.FeatureExtractor, 'load_or_compute', lambda self, *names: ready
  )
  with pytest.raises(DataError, match='whisper of clip .* has 0 rows'):
    latent_records.prepare_packed(tmp_path, [job])
  assert not list(tmp_path.iterdir())


def test_refusals(model, data, tmp_path, monkeypatch):
  def refused(error, sentence, *flags, data=data):
    with pytest.raises(error, match=sentence):
      run(model, data, *flags)

  refused(
    ConfigError,
    '--records needs a single process',
    f'--records={tmp_path}/x',
    '--num_processes=2',
  )
  refused(
    ConfigError,
    '--records needs a single process',
    f'--records={tmp_path}/x',
    '--multihost',
  )
  refused(
    ConfigError, 'lies in --data=.* name a folder outside', f'--records={data}/pod'
  )
  refused(ConfigError, 'must be on a disk', '--records=gs://bucket/pod')
  assert not (tmp_path / 'x').exists() and not (data / 'pod').exists()
  bare = prepare_synthetic(
    tmp_path / 'bare',
    SyntheticConfig(
      size=16, train=1, val=0, test=0, clips=1, seconds=0.4, content='embedder'
    ),
    workers=1,
  )
  refused(
    DataError,
    'no pixels, which latents is made from.*content=full',
    f'--records={tmp_path}/pod',
    f'--datasets={bare}',
    '--split=train',
    '--features=whisper',
  )
  assert not list((tmp_path / 'pod').iterdir())


@pytest.mark.parametrize('corpus', ('synthetic', 'mead'))
def test_preparation_offers_only_what_it_fills(corpus, tmp_path, capsys):
  with pytest.raises(ConfigError, match="invalid choice: 'latents'"):
    prepare.main([corpus, f'--out={tmp_path}', '--content=latents'])
  with pytest.raises(SystemExit):
    prepare.main([corpus, '--help'])
  assert 'data_pipelines.precompute --records' in ' '.join(
    capsys.readouterr().out.split()
  )

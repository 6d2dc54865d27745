"""Model folders that refer to others, and their portable copies."""

import json
import shutil

from etils import epath
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax import bundle, model_references, pack
from dicetalk_jax.component import Component
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.models import parameters, registry
from tests import tiny

PARAMS = {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)}
PRIOR = np.arange(4, dtype=np.float32), np.ones(4, np.float32)


def save(folder, name, value=0.0, **kwargs):
  params = {key: x + np.float32(value) for key, x in PARAMS.items()}
  bundle.save_component(
    folder, name, {'width': 3}, params, {'source': 'test'}, **kwargs
  )


@pytest.fixture
def source(tmp_path):
  """A model with three components, settings and a prior."""
  folder = tmp_path / 'source'
  for value, name in enumerate(('vae', 'unet', 'embedder')):
    save(folder, name, value)
  bundle.save_settings(folder, {'image_size': 64})
  bundle.save_priors(folder, {'happy': PRIOR}, 'abc')
  return folder


@pytest.fixture
def run(tmp_path):
  return tmp_path / 'run'


def adopt(source, run, trained=('unet',), needed=('vae',), priors=True, resuming=False):
  model_references.adopt(
    source, run, trained=trained, needed=needed, priors=priors, resuming=resuming
  )


def kernel(folder, name):
  return np.asarray(bundle.load_component(folder, name)[1]['kernel'])


def content(folder):
  files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_is_not_trained_is_referred_to_and_read_from_there(source, run):
  before = content(source)
  adopt(source, run)
  assert bundle.components(run).keys() == {'vae', 'embedder'}
  np.testing.assert_array_equal(kernel(run, 'vae'), PARAMS['kernel'])
  assert bundle.shapes(run, 'vae')['kernel'].shape == (2, 3)
  assert bundle.settings(run) == {'image_size': 64}
  np.testing.assert_array_equal(bundle.load_prior(run, 'happy'), PRIOR)
  save(run, 'unet', 9)
  assert content(source) == before
  np.testing.assert_array_equal(kernel(source, 'unet'), PARAMS['kernel'] + 1)
  np.testing.assert_array_equal(kernel(run, 'unet'), PARAMS['kernel'] + 9)


def test_references_lead_to_the_folder_that_holds_the_checkpoint(source, run, tmp_path):
  """However many runs lie between: the one in the middle is not needed."""
  adopt(source, run)
  adopt(run, tmp_path / 'second', trained=())
  shutil.rmtree(run)
  np.testing.assert_array_equal(kernel(tmp_path / 'second', 'vae'), PARAMS['kernel'])


def test_relative_folders_are_found_from_anywhere(source, run, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  adopt('source', run)
  monkeypatch.chdir('/')
  np.testing.assert_array_equal(kernel(run, 'vae'), PARAMS['kernel'])


def test_a_component_that_was_replaced_is_refused(source, run):
  adopt(source, run)
  save(source, 'vae', 5)
  with pytest.raises(
    WeightsError, match='takes its vae from .*, which has another one by'
  ):
    bundle.load_component(run, 'vae')
  save(source, 'vae', 0)  # the same values again
  np.testing.assert_array_equal(kernel(run, 'vae'), PARAMS['kernel'])


def test_a_folder_that_is_gone_is_named(source, run, tmp_path):
  adopt(source, run)
  source.rename(tmp_path / 'elsewhere')
  with pytest.raises(
    WeightsError, match='takes its vae from .*source, which has none now'
  ):
    bundle.load_component(run, 'vae')


def test_a_resumed_run_keeps_what_it_began_with(source, run):
  adopt(source, run)
  save(source, 'vae', 5)
  with pytest.raises(
    WeightsError, match='this run began with another vae than .*source'
  ):
    adopt(source, run, resuming=True)
  adopt(source, run)  # nothing was trained yet: it may begin with another one
  np.testing.assert_array_equal(kernel(run, 'vae'), PARAMS['kernel'] + 5)


def test_a_run_that_begins_again_forgets_what_it_referred_to(source, run, tmp_path):
  adopt(source, run)
  save(tmp_path / 'other', 'whisper')
  adopt(tmp_path / 'other', run)
  assert bundle.components(run).keys() == {'whisper'}
  adopt('', run)
  assert bundle.components(run) == {}


def test_a_run_that_begins_again_takes_settings_and_priors_of_the_new_model_alone(
  source, run, tmp_path
):
  adopt(source, run)
  other = tmp_path / 'other'
  save(other, 'vae')
  bundle.save_settings(other, {'kind': 'sonic'})
  adopt(other, run)
  assert bundle.settings(run) == {'kind': 'sonic'}
  assert bundle.emotions(run) == []


def test_references_that_lead_back_change_nothing(source, run, tmp_path):
  """A run may be given a model that builds on its own."""
  save(run, 'whisper', 3)
  between = tmp_path / 'between'
  adopt(run, between)
  for resuming in (False, True):
    adopt(between, run, needed=('whisper',), resuming=resuming)
    assert 'folder' not in bundle.components(run)['whisper']
    np.testing.assert_array_equal(kernel(run, 'whisper'), PARAMS['kernel'] + 3)
    np.testing.assert_array_equal(kernel(between, 'whisper'), PARAMS['kernel'] + 3)


def test_what_a_run_does_not_compute_with_does_not_stop_it(source, run, tmp_path):
  first = tmp_path / 'first'
  adopt(source, first, trained=())
  adopt(first, run)
  save(source, 'embedder', 5)  # no longer the one of `first`
  adopt(first, run, resuming=True)
  np.testing.assert_array_equal(kernel(run, 'vae'), PARAMS['kernel'])
  with pytest.raises(
    WeightsError, match='takes its embedder from .*another one by now'
  ):
    adopt(first, run, needed=('vae', 'embedder'), resuming=True)


def test_a_damaged_prior_is_found_before_anything_is_written(source, run):
  (source / 'priors/happy.npz').write_text('x')
  with pytest.raises(WeightsError, match='happy.npz is not an emotion prior'):
    adopt(source, run)
  assert not run.exists()


def test_priors_of_unknown_embedders_do_not_replace_known_ones(source):
  with pytest.raises(
    WeightsError, match='of another embedder .abc, not an unknown one'
  ):
    bundle.save_priors(source, {'happy': PRIOR})
  bundle.save_priors(source, {'happy': PRIOR}, 'abc')


def test_a_folder_that_cannot_be_written_is_named_in_a_sentence(tmp_path):
  (tmp_path / 'file').write_text('x')
  sentence = 'cannot write .*; check its permissions'
  with pytest.raises(InputError, match=sentence):
    bundle.save_priors(tmp_path / 'file', {'happy': PRIOR})
  with pytest.raises(InputError, match=sentence):
    bundle.save_settings(tmp_path / 'file', {'a': 1})


def test_an_address_that_cannot_be_reached_is_named_in_a_sentence(monkeypatch):
  def unreachable(self):
    raise RuntimeError('no credentials\nTraceback ...')

  monkeypatch.setattr(type(epath.Path('gs://bucket')), 'exists', unreachable)
  with pytest.raises(WeightsError, match=r'gs://bucket/.* cannot be reached .no cred'):
    bundle.require('gs://bucket/model')


def test_a_resumed_run_finds_its_model_at_another_place(source, run, tmp_path):
  adopt(source, run)
  source.rename(tmp_path / 'elsewhere')
  adopt(tmp_path / 'elsewhere', run, resuming=True)
  np.testing.assert_array_equal(kernel(run, 'vae'), PARAMS['kernel'])


def test_a_reference_in_place_of_a_component_removes_its_checkpoint(source, run):
  save(run, 'vae', 7)
  adopt(source, run)
  assert not list(run.glob('vae.*'))
  save(run, 'vae', 8)
  np.testing.assert_array_equal(kernel(run, 'vae'), PARAMS['kernel'] + 8)
  np.testing.assert_array_equal(kernel(source, 'vae'), PARAMS['kernel'])


def test_anything_but_a_model_folder_is_refused(run, tmp_path):
  with pytest.raises(WeightsError, match='nowhere is not a model folder'):
    adopt(tmp_path / 'nowhere', run)
  assert not run.exists()


def test_folders_of_the_first_format_are_read_and_referred_to(source, run):
  index = json.loads((source / bundle.INDEX).read_text())
  for entry in index['components'].values():
    del entry['fingerprint']
  (source / bundle.INDEX).write_text(json.dumps(index | {'format': 1}))
  np.savez(source / 'priors/happy.npz', mu=PRIOR[0], sigma=PRIOR[1])
  before = content(source)
  adopt(source, run)
  np.testing.assert_array_equal(kernel(run, 'vae'), PARAMS['kernel'])
  assert bundle.read_prior(run, 'happy')[1] == ''
  assert content(source) == before
  save(source, 'vae', 5)
  with pytest.raises(WeightsError, match='which has another one by now'):
    bundle.load_component(run, 'vae')


def test_fingerprints_are_those_of_the_loaded_network(tmp_path):
  """Wherever the values live, and in whatever order they are named."""
  config = tiny.CONFIGS['vae']
  params = parameters.numpy_params(
    parameters.abstract(registry.builder('vae', config))[1]
  )
  config = registry.config_of('vae', config).to_json()
  bundle.save_component(tmp_path, 'vae', config, params, {})
  fingerprint = bundle.components(tmp_path)['vae']['fingerprint']
  assert fingerprint == Component.load(tmp_path, 'vae').fingerprint
  turned = {name: np.asarray(params[name]) for name in reversed(params)}
  assert fingerprint == bundle.fingerprint(config, turned)
  other = turned | {'quant_conv.bias': turned['quant_conv.bias'] + 1}
  assert fingerprint != bundle.fingerprint(config, other)
  half = {name: jnp.asarray(x, jnp.bfloat16) for name, x in params.items()}
  assert fingerprint != bundle.fingerprint(config, half)


def pack_command(monkeypatch, *args):
  monkeypatch.setattr('sys.argv', ['pack', *map(str, args)])
  pack.run()


def test_a_packed_copy_needs_no_other_folder(
  source, run, tmp_path, monkeypatch, capsys
):
  adopt(source, run)
  save(run, 'unet', 9)
  packed = tmp_path / 'models/packed'
  pack_command(monkeypatch, f'--model={run}', f'--output={packed}')
  assert f'wrote {packed}: embedder, unet, vae' in capsys.readouterr().out
  shutil.rmtree(source)
  shutil.rmtree(run)
  moved = packed.rename(tmp_path / 'moved')
  assert not any('folder' in entry for entry in bundle.components(moved).values())
  np.testing.assert_array_equal(kernel(moved, 'vae'), PARAMS['kernel'])
  np.testing.assert_array_equal(kernel(moved, 'unet'), PARAMS['kernel'] + 9)
  assert bundle.settings(moved) == {'image_size': 64}
  assert bundle.read_prior(moved, 'happy')[1] == 'abc'
  assert [path.name for path in packed.parent.iterdir()] == []


def test_a_packed_copy_in_half_precision_keeps_the_embedder(source, run, tmp_path):
  save(source, 'emo_model', 3, priors='abc')
  adopt(source, run)
  save(run, 'unet', 1 / 3)
  model_references.pack(run, tmp_path / 'packed', half=True)
  unet = kernel(tmp_path / 'packed', 'unet')
  assert unet.dtype == np.float16
  np.testing.assert_array_equal(unet, kernel(run, 'unet').astype(np.float16))
  entries = bundle.components(tmp_path / 'packed')
  assert entries['embedder'] == bundle.components(source)['embedder']
  assert entries['unet']['fingerprint'] != bundle.components(run)['unet']['fingerprint']
  assert bundle.learned_priors(tmp_path / 'packed') == 'abc'
  np.testing.assert_array_equal(bundle.load_prior(tmp_path / 'packed', 'happy'), PRIOR)


def test_packing_replaces_a_model_folder_on_request_only(source, run, tmp_path):
  adopt(source, run)
  packed = tmp_path / 'packed'
  save(packed, 'old')
  with pytest.raises(InputError, match='packed exists; .* add --overwrite'):
    model_references.pack(run, packed)
  model_references.pack(run, packed, overwrite=True)
  assert bundle.components(packed).keys() == {'vae', 'embedder'}

  mine = tmp_path / 'mine'
  mine.mkdir()
  (mine / 'thesis.txt').write_text('years of work')
  with pytest.raises(InputError, match='mine exists and is not what would replace it'):
    model_references.pack(run, mine, overwrite=True)
  (tmp_path / 'file').write_text('x')
  with pytest.raises(InputError, match='file exists'):
    model_references.pack(run, tmp_path / 'file')
  with pytest.raises(InputError, match='cannot write .*; choose another place'):
    model_references.pack(run, tmp_path / 'file/below')


@pytest.mark.parametrize('place', ['source', 'run', '.', 'run/inner', 'link/source'])
def test_packing_never_touches_what_it_copies(source, run, tmp_path, place):
  """Not by another name either, nor from above or below."""
  adopt(source, run)
  (tmp_path / 'link').symlink_to(tmp_path)
  before = content(tmp_path)
  with pytest.raises(InputError, match='overlaps with .*, where the model comes from'):
    model_references.pack(run, tmp_path / place, overwrite=True)
  assert content(tmp_path) == before


def test_an_interrupted_copy_leaves_the_old_one_and_no_rest(source, run, tmp_path):
  adopt(source, run)
  packed = tmp_path / 'packed'
  save(packed, 'old')

  def interrupt(stage, done, total):
    if done in (1, total):
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    model_references.pack(run, packed, overwrite=True, progress=interrupt)
  assert bundle.components(packed).keys() == {'old'}
  assert {path.name for path in tmp_path.iterdir()} == {'source', 'run', 'packed'}


def test_a_packed_folder_of_an_odd_name_is_whole(tmp_path):
  """A checkpoint that an older version left incomplete is completed before the copy."""
  model = tmp_path / 'try [1]/model'
  save(model, 'vae')
  (model / 'vae.0/state/manifest.ocdbt').unlink()
  model_references.pack(model, tmp_path / 'packed')
  shutil.rmtree(model)
  np.testing.assert_array_equal(kernel(tmp_path / 'packed', 'vae'), PARAMS['kernel'])


def test_a_damaged_component_is_not_packed(source, tmp_path):
  shutil.rmtree(source / 'vae.0')
  with pytest.raises(WeightsError, match='vae.0 cannot be read'):
    model_references.pack(source, tmp_path / 'packed')
  assert not (tmp_path / 'packed').exists()


def test_a_changed_reference_is_not_packed(source, run, tmp_path):
  adopt(source, run)
  save(source, 'vae', 5)
  with pytest.raises(WeightsError, match='which has another one by now'):
    model_references.pack(run, tmp_path / 'packed')
  assert not (tmp_path / 'packed').exists()

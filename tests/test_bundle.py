"""Model folders: round trips, replacement that cannot be caught half-way, restoring
onto a mesh, clear refusals.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax import bundle, parallel
from dicetalk_jax.bundle import index
from dicetalk_jax.errors import WeightsError

PARAMS = {
  'conv.kernel': jnp.arange(128 * 64.0).reshape(128, 64),
  'conv.bias': jnp.arange(3.0),
  'book.embedding': jnp.array([1, 2], jnp.int32),
}
CONFIG = {'widths': (8, 16), 'kind': 'tiny'}


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / 'model'
  bundle.save_component(
    folder, 'vae', CONFIG, PARAMS, {'source': 'vae.safetensors', 'sha256': 'ab12'}
  )
  return folder


def assert_same(actual, expected):
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value)
    assert actual[name].dtype == value.dtype


def test_round_trip(folder):
  config, params = bundle.load_component(folder, 'vae')
  assert config == {'widths': [8, 16], 'kind': 'tiny'}
  assert_same(params, PARAMS)
  entry = bundle.components(folder)['vae']
  assert entry['provenance'] == {'source': 'vae.safetensors', 'sha256': 'ab12'}
  assert entry['parameters'] == 128 * 64 + 3 + 2
  assert json.loads((folder / 'bundle.json').read_text())['format'] == bundle.FORMAT


def test_dtype_applies_to_numbers_only(folder):
  _, params = bundle.load_component(folder, 'vae', dtype=jnp.bfloat16)
  assert params['conv.kernel'].dtype == jnp.bfloat16
  assert params['book.embedding'].dtype == jnp.int32


def test_components_are_replaced_one_by_one(folder):
  bundle.save_component(folder, 'unet', {}, {'x': np.ones(2, np.float32)}, {})
  for value in (5.0, 6.0):
    bundle.save_component(folder, 'vae', {'kind': 'new'}, {'y': jnp.full(2, value)}, {})
  config, params = bundle.load_component(folder, 'vae')
  assert config == {'kind': 'new'}
  assert_same(params, {'y': jnp.full(2, 6.0)})
  assert_same(bundle.load_component(folder, 'unet')[1], {'x': jnp.ones(2)})
  left = {path.name for path in folder.iterdir()}
  assert left == {'bundle.json', 'unet.0', 'vae.2'}


def test_a_killed_save_leaves_the_old_component(folder, monkeypatch):
  class Killed(BaseException):
    pass

  def kill(*_):
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(index, '_write_index', kill)
    with pytest.raises(Killed):
      bundle.save_component(folder, 'vae', {}, {'y': jnp.zeros(1)}, {})
  assert_same(bundle.load_component(folder, 'vae')[1], PARAMS)
  bundle.save_component(folder, 'vae', {}, {'y': jnp.zeros(1)}, {})
  assert_same(bundle.load_component(folder, 'vae')[1], {'y': jnp.zeros(1)})


def test_restores_onto_a_mesh(folder):
  mesh = parallel.make_mesh(data=2, fsdp=4)
  _, params = bundle.load_component(
    folder, 'vae', functools.partial(parallel.shardings, mesh=mesh)
  )
  assert params['conv.kernel'].sharding.spec == jax.P('fsdp', None)
  assert params['conv.kernel'].addressable_shards[0].data.shape == (32, 64)
  assert_same(params, PARAMS)
  again = {name: x.sharding for name, x in params.items()}
  assert (
    bundle.load_component(folder, 'vae', again)[1]['conv.kernel'].sharding
    == again['conv.kernel']
  )


def test_saves_from_a_mesh(folder):
  sharded = parallel.put_params(PARAMS, parallel.make_mesh(data=1, fsdp=8))
  bundle.save_component(folder, 'unet', {}, sharded, {})
  assert_same(bundle.load_component(folder, 'unet')[1], PARAMS)


def test_priors_and_settings(folder):
  priors = {'happy': (np.arange(4.0), np.ones(4)), 'sad': (np.zeros(4), np.ones(4))}
  bundle.save_priors(folder, priors)
  bundle.save_priors(folder, {'sad': (np.full(4, 2.0), np.zeros(4))})
  assert bundle.emotions(folder) == ['happy', 'sad']
  loaded = bundle.load_priors(folder)
  np.testing.assert_array_equal(loaded['happy'], np.float32(priors['happy']))
  np.testing.assert_array_equal(loaded['sad'][0], np.full(4, 2, np.float32))
  assert loaded['sad'][0].dtype == np.float32
  bundle.save_settings(folder, {'image_size': 64, 'area': 1.2})
  bundle.save_settings(folder, {'area': 1.3})
  assert bundle.settings(folder) == {'image_size': 64, 'area': 1.3}
  assert 'vae' in bundle.components(folder)


def test_a_missing_folder_holds_nothing(tmp_path):
  nowhere = tmp_path / 'nowhere'
  assert bundle.components(nowhere) == {}
  assert bundle.settings(nowhere) == {}
  assert bundle.emotions(nowhere) == []


def test_an_opened_folder_serves_as_a_path(folder):
  """It shows the folder as it was when it was opened, and is read no more."""
  bundle.save_priors(folder, {'happy': (np.zeros(2), np.ones(2))})
  model = bundle.ModelFolder.open(folder)
  assert str(model) == str(folder)
  (folder / 'bundle.json').rename(folder / 'elsewhere.json')
  assert_same(bundle.load_component(model, 'vae')[1], PARAMS)
  assert bundle.emotions(model) == ['happy']
  np.testing.assert_array_equal(bundle.load_prior(model, 'happy')[1], np.ones(2))
  with pytest.raises(WeightsError, match='has no unet; it has: vae'):
    model.require('vae', 'unet')


def damage_list(folder):
  (folder / 'vae.0/state/_METADATA').write_text('{')


def remove_checkpoint(folder):
  (folder / 'vae.0').rename(folder / 'elsewhere')


def other_format(folder):
  (folder / 'bundle.json').write_text(
    '{"format": 99, "components": {}, "settings": {}}'
  )


def damage_index(folder):
  (folder / 'bundle.json').write_text('[1, 2')


@pytest.mark.parametrize(
  'damage, sentence',
  [
    (damage_list, 'cannot be read'),
    (remove_checkpoint, 'cannot be read'),
    (other_format, 'format 99'),
    (damage_index, 'damaged'),
  ],
)
def test_damaged_folders(folder, damage, sentence):
  damage(folder)
  with pytest.raises(WeightsError, match=sentence) as info:
    bundle.load_component(folder, 'vae')
  assert '\n' not in str(info.value)


def test_missing_parts_are_named(folder, tmp_path):
  with pytest.raises(WeightsError, match='no unet and no whisper; it has: vae'):
    bundle.require(folder, 'unet', 'vae', 'whisper')
  with pytest.raises(WeightsError, match='is not a model folder'):
    bundle.load_component(tmp_path / 'nowhere', 'vae')
  bundle.save_priors(folder, {'happy': (np.zeros(2), np.ones(2))})
  with pytest.raises(WeightsError, match="no emotion 'bored' .* it has: happy"):
    bundle.load_prior(folder, 'bored')
  prior = folder / 'priors/happy.npz'
  for content in (b'no archive', prior.read_bytes()[:100]):
    prior.write_bytes(content)
    with pytest.raises(WeightsError, match='is not an emotion prior'):
      bundle.load_prior(folder, 'happy')


def test_pickled_priors_are_refused(folder):
  (folder / 'priors').mkdir()
  np.savez(
    folder / 'priors/evil.npz', mu=np.array([{'a': 1}], dtype=object), sigma=np.ones(1)
  )
  with pytest.raises(WeightsError, match='is not an emotion prior'):
    bundle.load_prior(folder, 'evil')

"""Emotion priors both ways; object arrays are read without executing them."""

import os
import pickle

import numpy as np
import pytest

from convert import torch_files
from dicetalk_jax import bundle, published_priors
from dicetalk_jax.errors import InputError, WeightsError
from tests.convert import published_folders as folders
from tests.convert.commands import run_convert

MU = np.linspace(-1, 1, 6, dtype=np.float32)


@pytest.fixture
def model(tmp_path):
  """A model folder whose emotion model takes 6 numbers."""
  bundle.save_component(
    tmp_path / 'model', 'emo_model', dict(prior_dim=6), {'x': np.zeros(1)}, {}
  )
  return tmp_path / 'model'


def save_published(path, mu=MU, **others):
  """Saves a prior as the authors of the reference implementation do."""
  path.parent.mkdir(exist_ok=True)
  np.save(path, {'mu': np.float32(mu).reshape(1, -1), **others}, allow_pickle=True)


def test_both_ways(model, tmp_path, capsys):
  save_published(tmp_path / 'npy/happy.npy')
  save_published(tmp_path / 'npy/sad.npy', -MU)
  np.save(tmp_path / 'calm.npy', MU.astype(np.float64) / 2)  # a plain array
  assert run_convert('priors', tmp_path / 'npy', tmp_path / 'calm.npy', model) == 0
  assert bundle.emotions(model) == ['calm', 'happy', 'sad']
  np.testing.assert_array_equal(bundle.load_prior(model, 'sad')[0], -MU)
  np.testing.assert_array_equal(bundle.load_prior(model, 'calm')[0], MU / 2)
  assert not bundle.load_prior(model, 'sad')[1].any()
  assert run_convert('priors', model, tmp_path / 'out') == 0
  out = capsys.readouterr().out
  row = f'{"priors":16} {3:6} {3:6} {0:9} {18:13} {72:13}  float32'
  assert out.count(row) == 2  # in and out
  digest = torch_files.sha256([tmp_path / 'npy/sad.npy'])['npy/sad.npy']
  assert f'sha256 {digest}  npy/sad.npy' in out
  for emotion in ('happy', 'sad'):
    # As the reference implementation reads them.
    ours, theirs = (
      np.load(tmp_path / f'{place}/{emotion}.npy', allow_pickle=True).item()
      for place in ('out', 'npy')
    )
    assert ours.keys() == theirs.keys() == {'mu'}
    assert ours['mu'].shape == (1, 6) and ours['mu'].dtype == np.float32
    np.testing.assert_array_equal(ours['mu'], theirs['mu'])


def test_deviations_survive(model, tmp_path):
  bundle.save_priors(model, {'happy': (MU, MU**2)})
  assert run_convert('priors', model, tmp_path / 'out') == 0
  (mu, sigma), embedder, others = published_priors.read(tmp_path / 'out/happy.npy')
  np.testing.assert_array_equal([mu, sigma], [MU, MU**2])
  assert not others and not embedder


def test_a_file_names_the_embedder_that_made_it(model, tmp_path):
  """The reference implementation reads it all the same."""
  bundle.save_priors(model, {'happy': (MU, MU**2)}, 'abc')
  assert run_convert('priors', model, tmp_path / 'out') == 0
  assert published_priors.read(tmp_path / 'out/happy.npy').embedder == 'abc'
  content = np.load(tmp_path / 'out/happy.npy', allow_pickle=True).item()
  np.testing.assert_array_equal(content['mu'], MU.reshape(1, -1))
  bundle.save_component(
    tmp_path / 'other', 'emo_model', dict(prior_dim=6), {'x': np.zeros(1)}, {}
  )
  assert run_convert('priors', tmp_path / 'out', tmp_path / 'other') == 0
  assert bundle.read_prior(tmp_path / 'other', 'happy')[1] == 'abc'


def test_priors_of_another_embedder_replace_none(model, tmp_path, capsys):
  bundle.save_priors(model, {'happy': (MU, MU**2), 'sad': (MU, MU)}, 'abc')
  assert run_convert('priors', model, tmp_path / 'out') == 0
  other = tmp_path / 'other'
  bundle.save_component(other, 'emo_model', dict(prior_dim=6), {'x': np.zeros(1)}, {})
  bundle.save_priors(other, {'sad': (-MU, MU)}, 'def')
  assert run_convert('priors', tmp_path / 'out', other, '--overwrite') == 2
  assert (
    "the emotion 'sad' of another embedder (def, not abc)" in capsys.readouterr().err
  )
  assert bundle.emotions(other) == ['sad']
  np.testing.assert_array_equal(bundle.load_prior(other, 'sad')[0], -MU)


def test_a_trained_model_keeps_the_embedder_of_its_priors_through_the_release_and_back(
  tmp_path,
):
  folders.save_dicetalk(tmp_path / 'release')
  model, again = tmp_path / 'model', tmp_path / 'again'
  assert run_convert('dicetalk', tmp_path / 'release', model) == 0
  config, params = bundle.load_component(model, 'emo_model')
  bundle.save_component(model, 'emo_model', config, params, {}, priors='abc')
  bundle.save_priors(model, {'happy': (MU, MU**2)}, 'abc')
  assert run_convert('export', model, tmp_path / 'out') == 0
  assert (
    run_convert(
      'dicetalk', tmp_path / 'out', again, '--priors', tmp_path / 'out/priors'
    )
    == 0
  )
  assert bundle.components(again)['emo_model']['priors'] == 'abc'
  assert bundle.read_prior(again, 'happy')[1] == 'abc'
  bundle.load_prior(again, 'happy')


def test_an_export_with_priors_that_the_emotion_model_would_misread_is_refused(
  tmp_path, capsys
):
  folders.save_dicetalk(tmp_path / 'release')
  assert run_convert('dicetalk', tmp_path / 'release', tmp_path / 'model') == 0
  bundle.save_priors(tmp_path / 'model', {'happy': (MU, MU**2)}, 'abc')
  assert run_convert('export', tmp_path / 'model', tmp_path / 'out') == 2
  assert 'learned on priors of another one (released)' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_a_whole_conversion_takes_them_along(tmp_path):
  folders.save_dicetalk(tmp_path / 'release')
  save_published(tmp_path / 'npy/happy.npy')
  assert (
    run_convert(
      'dicetalk', tmp_path / 'release', tmp_path / 'model', '--priors', tmp_path / 'npy'
    )
    == 0
  )
  assert bundle.emotions(tmp_path / 'model') == ['happy']
  assert bundle.read_prior(tmp_path / 'model', 'happy')[1] == bundle.RELEASED
  assert bundle.components(tmp_path / 'model')['emo_model']['priors'] == bundle.RELEASED
  assert run_convert('export', tmp_path / 'model', tmp_path / 'out') == 0
  content = np.load(tmp_path / 'out/priors/happy.npy', allow_pickle=True).item()
  assert content.keys() == {'mu'} and content['mu'].shape == (1, 6)


@pytest.mark.parametrize('protocol', range(2, 5))
@pytest.mark.parametrize('dtype', ['<f4', '>f8', '<f2'])
def test_every_spelling_of_an_array(tmp_path, protocol, dtype):
  path = tmp_path / 'happy.npy'
  save_published(path, label='x', step=3)
  header = path.read_bytes()[:128]
  for mu in (MU.reshape(1, -1), np.asfortranarray(MU)):
    content = np.array({'mu': mu.astype(dtype), 'label': 'x', 'step': 3}, object)
    path.write_bytes(header + pickle.dumps(content, protocol))
    prior, _, others = published_priors.read(path)
    np.testing.assert_array_equal(prior[0], mu.astype(dtype).astype(np.float32).ravel())
    assert others == ['label', 'step']


class Exploit:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_a_malicious_prior_executes_nothing(model, tmp_path, capsys):
  for content in ({'mu': Exploit(tmp_path / 'pwned')}, Exploit(tmp_path / 'pwned')):
    (tmp_path / 'npy').mkdir(exist_ok=True)
    np.save(tmp_path / 'npy/happy.npy', np.array(content, object), allow_pickle=True)
    assert run_convert('priors', tmp_path / 'npy', model) == 2
    assert (
      'asks to run code (posix.mkdir), which was not done' in capsys.readouterr().err
    )
    assert run_convert('inspect', tmp_path / 'npy') == 2
  assert not (tmp_path / 'pwned').exists() and not bundle.emotions(model)


@pytest.mark.parametrize(
  'content',
  [
    np.array([{'mu': MU}, 3], object),
    np.array({'mean': MU}, object),
    np.array({'mu': [1, 2]}, object),
    np.array({'mu': np.array(['a'])}, object),
    np.array({'mu': np.array([{}], object)}, object),
    np.array(['text']),
    np.array({'mu': MU.reshape(2, 3)}, object),
    MU.reshape(6, 1),
    MU[0],
    np.array({'mu': MU, 'sigma': MU[:2]}, object),
    MU * np.nan,
    np.array({'mu': MU + np.inf}, object),
  ],
)
def test_other_contents_are_refused(tmp_path, content):
  np.save(tmp_path / 'x.npy', content, allow_pickle=True)
  with pytest.raises(WeightsError, match='x.npy'):
    published_priors.read(tmp_path / 'x.npy')


@pytest.mark.parametrize('content', [b'', b'junk' * 50, b'\x93NUMPY\x01\x00v\x00{'])
def test_damaged_files_are_refused(tmp_path, content):
  (tmp_path / 'x.npy').write_bytes(content)
  with pytest.raises(WeightsError, match='is not an emotion prior'):
    published_priors.read(tmp_path / 'x.npy')
  with pytest.raises(InputError, match='No such file'):
    published_priors.read(tmp_path / 'y.npy')
  (tmp_path / 'z.npy').write_bytes(bytes(published_priors.MAX_BYTES + 1))
  with pytest.raises(WeightsError, match='too large'):
    published_priors.read(tmp_path / 'z.npy')


def test_truncated_published_file(tmp_path):
  save_published(tmp_path / 'happy.npy')
  whole = (tmp_path / 'happy.npy').read_bytes()
  for length in range(0, len(whole), 7):
    (tmp_path / 'happy.npy').write_bytes(whole[:length])
    with pytest.raises(WeightsError, match='is not an emotion prior'):
      published_priors.read(tmp_path / 'happy.npy')


def test_what_does_not_fit_the_model(model, tmp_path, capsys):
  def refused(*args):
    assert run_convert('priors', *args) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1
    return err

  save_published(tmp_path / 'npy/happy.npy')
  save_published(tmp_path / 'wide/sad.npy', np.ones(9))
  assert 'has 9 numbers, the model wants 6' in refused(tmp_path / 'wide', model)
  assert 'two files are named happy.npy' in refused(
    tmp_path / 'npy', tmp_path / 'npy/happy.npy', model
  )
  assert 'has no .npy files' in refused(tmp_path, model)
  assert 'is not a model folder' in refused(tmp_path / 'npy', tmp_path / 'nowhere')
  assert 'has no priors' in refused(model, tmp_path / 'out')
  assert run_convert('priors', tmp_path / 'npy', model) == 0
  assert 'has happy already; add --overwrite' in refused(tmp_path / 'npy', model)
  assert run_convert('priors', tmp_path / 'npy', model, '--overwrite') == 0
  assert f'{tmp_path}/npy exists' in refused(model, tmp_path / 'npy')

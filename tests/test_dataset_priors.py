"""The priors of a data set, from the command line."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest

from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import SyntheticConfig
from dicetalk_jax import bundle, dataset_priors, embed, published_priors
from dicetalk_jax.component import Component
from dicetalk_jax.data import feature_extraction
from dicetalk_jax.data.clip_record import UNKNOWN
from dicetalk_jax.data.clip_source import ClipSource
from tests import tiny
from tests.prior_commands import (
  assert_help_without_arguments,
  assert_refused,
  output_of,
  save_model,
)

# Clips as the embedder reads them.
CLIPS = SyntheticConfig(train=1, val=0, test=0, seconds=0.4, content='embedder')


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation(), tiny.shared_programs():
    yield


@pytest.fixture(scope='module')
def saved_model(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp('model'))


@pytest.fixture
def model(saved_model, tmp_path):
  """A copy for each test, because the command saves priors in it."""
  return shutil.copytree(saved_model, tmp_path / 'model')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """One person in every emotion, at two levels except for neutral."""
  folder = tmp_path_factory.mktemp('data')
  config = dataclasses.replace(CLIPS, clips=16, levels=(1, 3))
  prepare_synthetic(folder, config, workers=1)
  return folder


@pytest.fixture(scope='module')
def dataset(data):
  """The folder of the data set itself."""
  return next(data.rglob('dataset_info.json')).parent


@pytest.fixture
def nothing_may_be_computed(monkeypatch):
  def fail(*_):
    pytest.fail('features were computed')

  monkeypatch.setattr(feature_extraction.FeatureExtractor, 'load_or_compute', fail)


def test_the_prior_of_an_emotion_is_the_mean_over_its_clips(
  model, data, dataset, tmp_path
):
  files = tmp_path / 'npy'
  out = output_of(
    dataset_priors, model=model, data=data, by_intensity=True, output=files
  )
  assert 'wrote 22 priors of 16 clips' in out
  names = bundle.emotions(model)
  assert len(names) == 22
  assert {'neutral', 'happy', 'happy_1', 'happy_3'} <= set(names)
  assert 'neutral_1' not in names

  # A single clip is happy at level 1.
  source = ClipSource(dataset)
  embedder = Component.load(model, 'embedder')
  whisper = Component.load(model, 'whisper')
  table = source.table
  (clip,) = np.flatnonzero((table.emotion == 'happy') & (table.intensity == 1))
  record = source[clip]
  expression = record['expression']
  wave = record['audio'].astype(np.float32) / 32767
  states = feature_extraction.speech_states(whisper, wave, len(expression))
  expected = feature_extraction.gaussian(embedder, expression, states)
  prior = bundle.load_prior(model, 'happy_1')
  np.testing.assert_allclose(prior, expected, rtol=1e-5, atol=1e-6)
  # There is a clip at level 1 and one at level 3.
  levels = [bundle.load_prior(model, f'happy_{level}') for level in (1, 3)]
  np.testing.assert_allclose(
    bundle.load_prior(model, 'happy'), np.mean(levels, axis=0), rtol=1e-5, atol=1e-6
  )

  for name in names:
    np.testing.assert_array_equal(
      published_priors.read(files / f'{name}.npy').prior,
      bundle.load_prior(model, name),
    )


def test_priors_of_several_data_sets(model, data, dataset, tmp_path):
  """Clips of all sets count alike, except for those without labels.

  The features are stored where training finds them.
  """

  def sad():
    return np.stack(bundle.load_prior(model, 'sad'))

  out = output_of(dataset_priors, model=model, data=tmp_path, datasets=dataset)
  assert 'wrote 8 priors of 16 clips' in out
  of_the_first = sad()

  config = dataclasses.replace(CLIPS, train=2, clips=8, levels=(3,), seed=1)
  other = prepare_synthetic(tmp_path, config, workers=1)
  shutil.copytree(data / 'synthetic', tmp_path / 'synthetic', dirs_exist_ok=True)
  out = output_of(dataset_priors, model=model, data=tmp_path)
  assert 'wrote 8 priors of 32 clips' in out
  of_both = sad()
  output_of(dataset_priors, model=model, data=tmp_path, datasets=other)
  expected = (of_the_first + sad()) / 2
  np.testing.assert_allclose(of_both, expected, rtol=1e-5, atol=1e-6)

  table = ClipSource(other).table
  unlabelled = dataclasses.replace(table, emotion=np.full(len(table), UNKNOWN))
  unlabelled.save(other / 'clips-train.npz')
  out = output_of(dataset_priors, model=model, data=tmp_path)
  assert 'wrote 8 priors of 16 clips' in out
  assert_refused(
    'has an emotion label, which priors need',
    dataset_priors,
    model=model,
    data=tmp_path,
    datasets=other,
  )
  assert not list(other.rglob('features'))
  assert list((tmp_path / 'features').iterdir())


def test_priors_of_another_embedder_are_never_replaced(model, data, tmp_path):
  """The emotion model learned on them."""
  theirs = bundle.load_prior(model, 'happy')
  bundle.save_priors(model, {'happy': theirs}, 'abc')
  sentence = "has the emotion 'happy' of another embedder (abc, not "
  tiny.write_speech(tmp_path / 'speech.wav')
  assert_refused(
    sentence,
    embed,
    model=model,
    audio=tmp_path / 'speech.wav',
    save='happy',
    overwrite=True,
  )
  assert_refused(sentence, dataset_priors, model=model, data=data)
  np.testing.assert_array_equal(bundle.load_prior(model, 'happy'), theirs)


@pytest.mark.parametrize('kind', ['a file', 'below a file', 'unwritable'])
@pytest.mark.usefixtures('nothing_may_be_computed')
def test_output_that_cannot_be_written_is_refused_before_embedding(
  model, data, tmp_path, kind
):
  file = tmp_path / 'file'
  file.write_bytes(b'mine')
  places = {
    'a file': file,
    'below a file': file / 'npy',
    'unwritable': pathlib.Path('/proc'),
  }
  place = places[kind]
  sentence = f'cannot write into {place}: '
  assert_refused(sentence, dataset_priors, model=model, data=data, output=place)
  assert file.read_bytes() == b'mine'
  assert bundle.emotions(model) == sorted(tiny.EMOTIONS)


@pytest.mark.usefixtures('nothing_may_be_computed')
def test_a_model_that_cannot_be_written_is_refused_before_embedding(model, data):
  priors = model / 'priors'
  shutil.rmtree(priors)
  priors.write_bytes(b'mine')
  sentence = f'cannot write into {priors}: '
  assert_refused(sentence, dataset_priors, model=model, data=data)
  assert priors.read_bytes() == b'mine'


def test_bad_data_sets(saved_model, data, dataset, tmp_path):
  good = dict(model=saved_model, data=data)

  def refused(sentence, **flags):
    assert_refused(sentence, dataset_priors, **{**good, **flags})

  refused('no prepared data set below', data=tmp_path)
  refused("has no split 'test'", split='test')
  refused('not a model folder', model=tmp_path)
  refused('is itself a data set; name it with --datasets', data=dataset)
  assert_refused('--data', dataset_priors, model=saved_model)


def test_the_help_is_shown_without_arguments():
  assert_help_without_arguments(dataset_priors)

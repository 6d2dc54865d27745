"""The embedder on several data sets, on face crops, and on data that lacks something;
what it left as features of the diffusion task.
"""

import dataclasses
import shutil
import types

import jax
import numpy as np
import pytest

from configs import embedder
from data_pipelines import precompute
from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import SyntheticConfig
from dicetalk_jax import bundle, main
from dicetalk_jax.data import face_crops, feature_extraction
from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.data.clip_source import ClipSource, ClipTable
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError, WeightsError
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.training import datasets
from tests.training import micro


@pytest.fixture(scope='module')
def data(trained, tmp_path_factory):
  """A copy of the data sets, to which another one is added."""
  return shutil.copytree(trained / 'data', tmp_path_factory.mktemp('two') / 'data')


@pytest.fixture(scope='module')
def two_sets(data):
  """The synthetic data set and another one."""
  (first,) = (path.parent for path in (data / 'synthetic').rglob('dataset_info.json'))
  second = prepare_synthetic(
    data / 'more',
    SyntheticConfig(size=32, train=1, val=1, test=0, seconds=0.6, clips=8, seed=1),
    workers=1,
  )
  return first, second


def test_training_takes_precomputed_features_and_mixes_by_weight(
  trained, data, two_sets, tmp_path, monkeypatch
):
  precompute.main([f'--model={trained}/diffusion/model', f'--data={data}', '--batch=4'])

  def fail(*_):
    raise AssertionError('computed again')

  monkeypatch.setattr(feature_extraction, '_batched', fail)
  config = micro.config_of('diffusion')
  config.data.dataset = '{}=1, {}=3'.format(*two_sets)
  config.model, config.data.dir = str(trained / 'diffusion/model'), str(data)
  task = main.task_class('diffusion')(config, micro.ONE, tmp_path)
  priors = [part.features['prior'] for part in task.parts['train']]
  of_second = [prior(clip)[0, 0] for prior in priors[1:] for clip in range(len(prior))]
  mu = next(task.batches())['mu']
  assert (
    sum(any((row == other).all() for other in of_second) for row in mu) == 6
  )  # of 8
  assert task.init(jax.random.key(0))['emo_model.codebook.codebook.embedding'].any()


def test_embedder_of_several_data_sets(data, two_sets, tmp_path):
  state = micro.run(
    'embedder',
    tmp_path / 'embedder',
    steps=1,
    dir=str(data),
    dataset=f'synthetic=0.5,{two_sets[1]}=0.5',
  )
  assert int(state.step) == 1 and np.isfinite(
    micro.rows(tmp_path, 'embedder')[-1]['eval/clustering']
  )
  assert set(EMOTIONS) < set(bundle.emotions(tmp_path / 'embedder/model'))


def test_embedder_of_a_data_set_with_and_one_without_expressions(
  data, two_sets, tmp_path, monkeypatch
):
  """The latter has columns for another tracker.

  Its clips are heard only, in training, evaluation and priors.
  """
  read, scan = ClipSource.__getitem__, ClipTable.load

  def bare(record):
    return record | {'expression': np.zeros((0, 51), np.float32)}

  monkeypatch.setattr(
    ClipSource,
    '__getitem__',
    lambda self, i: (bare if self.folder == two_sets[1] else dict)(read(self, i)),
  )
  monkeypatch.setattr(
    ClipTable,
    'load',
    lambda path: dataclasses.replace(
      scan(path),
      **(
        {'motion_exp': np.zeros(len(scan(path)))} if path.parent == two_sets[1] else {}
      ),
    ),
  )
  assert [ClipSource(folder).expression_dim for folder in two_sets] == [64, 0]
  assert ClipSource(two_sets[1])[0]['expression'].shape == (0, 51)
  micro.run(
    'embedder',
    tmp_path / 'embedder',
    steps=1,
    arg='tiny,mediapipe',
    dir=str(data),
    dataset='{}=1,{}=1'.format(*two_sets),
  )
  assert np.isfinite(micro.rows(tmp_path, 'embedder')[-1]['eval/clustering'])
  assert set(EMOTIONS) < set(bundle.emotions(tmp_path / 'embedder/model'))


def test_embedder_of_expressions_of_another_width_is_refused(data, tmp_path):
  config = micro.config_of('embedder')
  config.data.dir, config.embedder.expr_dim = str(data), 51
  with pytest.raises(
    ConfigError,
    match='expr_dim=51, but the clips of .* have 64 expression coefficients per frame',
  ):
    main.task_class('embedder')(config, micro.ONE, tmp_path)


def test_embedder_with_one_person_to_validate(data, two_sets, tmp_path):
  """Scores that compare people are left out."""
  micro.run(
    'embedder',
    tmp_path / 'embedder',
    steps=1,
    dir=str(data),
    dataset=str(two_sets[1]),
    identities=1,
    emotions=4,
  )
  scores = {
    name for name in micro.rows(tmp_path, 'embedder')[-1] if name.startswith('eval/')
  }
  assert 'eval/norm' in scores and not scores & {
    'eval/emotion_accuracy',
    'eval/identity_accuracy',
  }


def set_width(monkeypatch, width):
  """Lets training find two clips with so many expression coefficients."""
  table = {f.name: np.zeros(2, int) for f in dataclasses.fields(ClipTable)} | {
    'emotion': np.array(['happy', 'sad'])
  }
  source = types.SimpleNamespace(table=ClipTable(**table), expression_dim=width)
  part = DatasetPart(source)
  monkeypatch.setattr(datasets, 'open_train_and_val', lambda *_: ([part], [part]))


@pytest.mark.parametrize(
  ('width', 'arg', 'error'),
  [
    (0, 'default', DataError),
    (0, 'video_only', DataError),
    (64, 'default', WeightsError),
    (0, 'crops', WeightsError),
    (0, 'audio_only', WeightsError),
  ],
)
def test_embedder_of_data_without_expressions(tmp_path, monkeypatch, width, arg, error):
  """Refused, unless the embedder reads something else; the next thing missing is
  Whisper then.
  """
  set_width(monkeypatch, width)
  with pytest.raises(
    error,
    match='--expression=DIR, .* preset .crops.'
    if error is DataError
    else 'has no whisper',
  ):
    main.task_class('embedder')(embedder.get_config(arg), micro.ONE, tmp_path / 'run')


def test_embedder_of_another_whisper(tmp_path, monkeypatch):
  set_width(monkeypatch, 64)
  config = micro.config_of('embedder')
  config.embedder.whisper_states = 5
  with pytest.raises(
    ConfigError, match='whisper_states=5, but the Whisper encoder of .* has 2 states'
  ):
    main.task_class('embedder')(config, micro.ONE, tmp_path / 'run')


def test_embedder_of_crops_and_its_priors_in_diffusion(trained, tmp_path):
  shutil.copytree(trained / 'data', tmp_path / 'data')
  micro.run('embedder', tmp_path / 'embedder', steps=2, arg='tiny,crops')
  scores = micro.rows(tmp_path, 'embedder')[-1]
  assert scores['eval/sigma'] > 0
  for name in ('', 'video_', 'audio_'):  # paper table 5
    each = [
      value
      for key, value in scores.items()
      if key.startswith(f'eval/{name}clustering/')
    ]
    assert len(each) > 1 and np.mean(each) == pytest.approx(
      scores[f'eval/{name}clustering']
    )
  assert set(EMOTIONS) < set(bundle.emotions(tmp_path / 'embedder/model'))
  vae = micro.config_of('autoencoder').vae.to_dict()
  bundle.save_component(
    tmp_path / 'embedder/model',
    'vae',
    vae,
    parameters.numpy_params(parameters.abstract(registry.builder('vae', vae))[1]),
    {},
  )
  config = micro.config_of('diffusion')
  config.model = str(tmp_path / 'embedder/model')
  task = main.task_class('diffusion')(config, micro.ONE, tmp_path / 'diffusion')
  part = task.parts['train'][0]
  want = feature_extraction.gaussian(
    task.embedder, face_crops.of_record(part.source[1], 8), part.features['whisper'](1)
  )
  np.testing.assert_allclose(part.features['prior'](1)[0], want, atol=1e-5)

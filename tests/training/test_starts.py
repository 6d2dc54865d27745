"""Where the weights of a run come from: `init_from`, adapters, what stays frozen."""

import importlib

import jax
import numpy as np
import pytest

from dicetalk_jax import bundle, main, model_references
from dicetalk_jax.data.feature_extraction import FeatureExtractor
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError, WeightsError
from dicetalk_jax.models import parameters
from dicetalk_jax.training import workdir
from tests.training import micro


def test_a_frozen_emotion_model_of_other_priors_is_refused(trained, tmp_path):
  start = tmp_path / 'start'
  model_references.pack(trained / 'diffusion/model', start)
  config, params = bundle.load_component(start, 'emo_model')
  bundle.save_component(start, 'emo_model', config, params, {}, priors=bundle.RELEASED)
  frozen = micro.config_of('diffusion')
  frozen.init_from, frozen.trainable = str(start), ('^unet',)
  with pytest.raises(
    WeightsError, match='learned on priors of another embedder .released.* train it too'
  ):
    micro.diffusion_task(trained, frozen, tmp_path / 'run')
  frozen.trainable = ('^unet', '^emo_model')
  micro.diffusion_task(trained, frozen, tmp_path / 'run')


def plain_svd(folder, model):
  """A model folder with the trained UNet, but without adapters."""
  config, params = bundle.load_component(model, 'unet')
  plain = {name: x for name, x in params.items() if '.processor.' not in name}
  bundle.save_component(
    folder, 'unet', config | {'adapters': 0}, plain, {'source': 'test'}
  )
  return plain


def test_adapters_are_added_to_a_plain_unet(tmp_path, trained):
  plain = plain_svd(tmp_path / 'plain', trained / 'diffusion/model')
  config = micro.config_of('diffusion')
  config.init_from, config.trainable = str(tmp_path / 'plain'), ('adapters',)
  task = micro.diffusion_task(trained, config, tmp_path / 'run')
  unet = parameters.strip_prefix('unet', task.init(jax.random.key(0)))
  assert unet.keys() == bundle.shapes(trained / 'diffusion/model', 'unet').keys()
  attention = 'mid_block.attentions.0.transformer_blocks.0.attn2.'
  for name in unet:
    source = name.replace('processor.', '').replace('_ip.0', '').replace('_ip.1', '')
    np.testing.assert_array_equal(unet[name], plain[source], err_msg=name)
  assert (
    unet[f'{attention}processor.to_k_ip.1.kernel']
    is not unet[f'{attention}processor.to_k_ip.0.kernel']
  )


@pytest.mark.parametrize(
  ('changes', 'error', 'sentence'),
  [
    (
      dict(trainable=('adapters',)),
      ConfigError,
      "would freeze .* such as 'unet.* at random values; name a model folder",
    ),
    (
      dict(trainable=('^unet',), init_from=True),
      ConfigError,
      "such as 'audio_linear.* at random values",
    ),
    (
      dict(trainable=('unett',)),
      ConfigError,
      'sets are: all, adapters, adapters_temporal',
    ),
    (
      dict(wide=True, init_from=True),
      WeightsError,
      r"another unet .*'add_embedding.linear_1.kernel' is \(96, ",
    ),
  ],
)
def test_starts_that_cannot_be(tmp_path, trained, changes, error, sentence):
  config = micro.config_of('diffusion')
  plain_svd(tmp_path / 'plain', trained / 'diffusion/model')
  config.trainable = changes.get('trainable', config.trainable)
  config.init_from = str(tmp_path / 'plain') if 'init_from' in changes else 'random'
  if 'wide' in changes:
    (
      config.unet.addition_time_embed_dim,
      config.unet.projection_class_embeddings_input_dim,
    ) = 64, 192
  with pytest.raises(error, match=sentence):
    micro.diffusion_task(trained, config, tmp_path / 'run').init(jax.random.key(0))


@pytest.mark.parametrize('task', ['autoencoder', 'embedder', 'diffusion'])
def test_random_weights_must_be_asked_for_by_name(trained, tmp_path, task):
  config = micro.config_of(task)
  config.model = str(trained / 'embedder/model')
  config.data.dir = str(trained / 'data')

  def make():
    return main.task_class(task)(config, micro.ONE, tmp_path / task)

  config.init_from = ''
  with pytest.raises(
    ConfigError, match='convert svd .*, or ask for random weights by .*init_from=random'
  ):
    make()
  if task != 'embedder':
    # A folder without the component would leave it at random values.
    config.init_from = str(tmp_path / 'other')
    bundle.save_settings(config.init_from, {})
    with pytest.raises(WeightsError, match='other has no (vae|unet)'):
      make()
  config.init_from = 'random'
  assert make().init(jax.random.key(0))


def test_a_run_of_an_older_version_with_random_weights_is_resumed():
  old = {'init_from': '', 'data': {}}
  new = {'init_from': 'random', 'data': {'corpora': []}}
  assert workdir._changes(old, new) == []
  assert workdir._changes(old, new | {'init_from': 'models/svd'}) == [
    'init_from (was random, now models/svd)'
  ]


@pytest.mark.parametrize('task', ['autoencoder', 'diffusion'])
def test_full_size_starts_from_nothing_of_its_own(task):
  assert importlib.import_module(f'configs.{task}').get_config().init_from == ''


def fine_tuning(task, trained, tmp_path):
  """The task on a start in half precision and with the published scaling factor."""
  name = {'autoencoder': 'vae'}.get(task, task)
  config, params = bundle.load_component(trained / 'diffusion/model', name)
  published = {'scaling_factor': 0.18215} if name == 'vae' else {}
  bundle.save_component(
    tmp_path / 'start',
    name,
    config | published,
    {k: np.asarray(x, np.float16) for k, x in params.items()},
    {},
  )
  config = micro.config_of(task)
  config.model = str(trained / 'embedder/model')
  config.init_from, config.data.dir = str(tmp_path / 'start'), str(trained / 'data')
  return name, config, lambda: main.task_class(task)(config, micro.ONE, tmp_path / task)


@pytest.mark.parametrize('task', ['autoencoder', 'embedder'])
def test_fine_tuning_goes_on_in_full_precision(trained, tmp_path, task):
  _, config, make = fine_tuning(task, trained, tmp_path)
  assert {x.dtype for x in make().init(jax.random.key(0)).values()} == {
    np.dtype(np.float32)
  }


def test_a_fine_tuned_autoencoder_keeps_its_scaling_factor(trained, tmp_path):
  _, config, make = fine_tuning('autoencoder', trained, tmp_path)

  def factor(folder):
    return bundle.components(folder)['vae']['config']['scaling_factor']

  task = make()
  task.export(task.init(jax.random.key(0)))
  assert (
    factor(tmp_path / 'autoencoder/model')
    == 0.18215
    != factor(trained / 'autoencoder/model')
  )
  config.init_from = 'random'
  task = make()
  task.export(task.init(jax.random.key(0)))
  assert factor(tmp_path / 'autoencoder/model') != 0.18215


@pytest.mark.parametrize(
  ('task', 'changes', 'sentence'),
  [
    (
      'autoencoder',
      {'block_out_channels': (8, 24)},
      'has another vae .* here; change config.vae or choose another',
    ),
    (
      'embedder',
      {'width': 16},
      'has another embedder .* here; change config.embedder or choose another',
    ),
  ],
)
def test_starts_of_other_sizes_are_refused(trained, tmp_path, task, changes, sentence):
  name, config, make = fine_tuning(task, trained, tmp_path)
  config[name].update(changes)
  with pytest.raises(WeightsError, match=sentence):
    make().init(jax.random.key(0))


def test_clips_without_labels_are_announced_before_anything_is_computed(
  trained, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(DatasetPart, 'labelled', False)

  def compute(*args):
    raise AssertionError('announced too late')

  monkeypatch.setattr(FeatureExtractor, 'load_or_compute', compute)
  with pytest.raises(AssertionError, match='announced too late'):
    micro.diffusion_task(trained, micro.config_of('diffusion'), tmp_path / 'run')
  assert 'has an emotion label: the emotion classifier' in capsys.readouterr().out
  with pytest.raises(DataError, match='the embedder learns from labels'):
    fine_tuning('embedder', trained, tmp_path)[2]()

"""Values of a configuration that cannot work are refused before anything is computed.

The sentence names the value, and those that work.
"""

import importlib

import jax
import pytest

from dicetalk_jax.errors import ConfigError
from dicetalk_jax.training import config_checks
from dicetalk_jax.training.loop import train
from dicetalk_jax.training.task import Task

TASKS = ('autoencoder', 'embedder', 'diffusion')


def tiny(task, **changes):
  config = importlib.import_module(f'configs.{task}').get_config('tiny')
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config


class Untouched(Task):
  """Fails if it is constructed: then something has begun already."""

  name = 'untouched'

  def __init__(self, *args):
    raise AssertionError


@pytest.mark.parametrize('task', TASKS)
def test_an_unknown_dtype(tmp_path, task):
  with pytest.raises(ConfigError) as refused:
    train(Untouched, tiny(task, dtype='fp16'), tmp_path / 'run')
  assert str(refused.value) == (
    "config.dtype='fp16' is unknown; choose one of: bfloat16, float32, float16"
  )
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('key', 'value', 'sentence'),
  [
    ('optim.lr', -1.0, 'config.optim.lr=-1.0 must be at least 0'),
    ('optim.ema', 1.5, 'config.optim.ema=1.5 must be at least 0 and at most 1'),
    ('noise.p_std', 0.0, 'config.noise.p_std=0.0 must be more than 0'),
    ('emotion.p_whole_bank', 2.0, 'must be at least 0 and at most 1'),
    ('data.workers', -1, 'config.data.workers=-1 must be at least 0'),
    ('seed', -1, 'config.seed=-1 must be at least 0'),
    ('unet.layers_per_block', -1, 'config.unet.layers_per_block=-1 is a size or'),
    ('unet.block_out_channels', (), 'config.unet.block_out_channels is empty'),
    ('frozen.whisper.d_model', -8, 'config.frozen.whisper.d_model=-8 is a size'),
    ('trainable', ('attn[',), "config.trainable has 'attn[', which is not a regular"),
    ('lora.targets', ('to_(q',), "config.lora.targets has 'to_(q', which is not"),
  ],
)
def test_numbers_and_patterns(tmp_path, key, value, sentence):
  with pytest.raises(ConfigError) as refused:
    train(Untouched, tiny('diffusion', **{key: value}), tmp_path / 'run')
  assert sentence in str(refused.value)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('preset', ['default', 'tiny'])
def test_the_configurations_pass(task, preset):
  config_checks.loop(importlib.import_module(f'configs.{task}').get_config(preset))


@pytest.mark.parametrize(
  ('task', 'name', 'key', 'value', 'sentence'),
  [
    ('autoencoder', 'vae', 'norm_num_groups', 3, 'config.vae does not make a model'),
    ('embedder', 'embedder', 'heads', 7, 'a multiple of heads=7'),
    ('diffusion', 'unet', 'in_channels', 0, 'config.unet does not make a model'),
    ('diffusion', 'unet', 'down_block_types', ('X',) * 3, "'X', which is unknown"),
    ('diffusion', 'emo_model', 'num_heads', 7, 'a multiple of num_heads=7'),
  ],
)
def test_sizes_that_make_no_model(task, name, key, value, sentence):
  config = tiny(task, **{f'{name}.{key}': value})
  with pytest.raises(ConfigError, match=sentence):
    config_checks.structure(config, name)
  _, _, target = config_checks.structure(tiny(task), name)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in target.values())

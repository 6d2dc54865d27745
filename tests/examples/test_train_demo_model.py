"""The training of the demo model: its speech encoder, and its configurations."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from data_pipelines.builders.synthetic import prepare_synthetic
from dicetalk_jax import bundle, parallel
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.main import task_class
from dicetalk_jax.training import config_checks, loop
from examples import demo_data
from examples.train_demo_model import settings
from examples.train_demo_model.speech import (
  POSITIONS,
  UNKNOWN,
  SpeechExamples,
  SpeechTask,
)
from tests import shared

TINY = dataclasses.replace(
  demo_data.SHARD, size=16, train=1, val=1, clips=3, seconds=0.8
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  def make(folder):
    prepare_synthetic(folder, TINY, workers=1)

  folder = shared.made_once(tmp_path_factory, 'speech', make)
  return next(folder.glob('synthetic/*/*/dataset_info.json')).parent


def test_windows_of_speech_carry_the_phonemes_of_their_clips(data):
  source = ClipSource(data)
  examples = SpeechExamples(DatasetPart(source))
  example = examples(1, np.random.default_rng(0))
  heard = int((example['label'] != UNKNOWN).sum())
  first = np.repeat(source[1]['phoneme'], 2)
  assert example['log_mel'].shape == (2 * POSITIONS, 80)
  np.testing.assert_array_equal(example['label'][: len(first)], first)
  assert heard > len(first)  # more clips follow
  assert (example['label'][heard:] == UNKNOWN).all()
  quiet = example['log_mel'][2 * heard + 50 :]
  assert np.ptp(quiet) < 1e-6  # nothing is heard where nothing is labelled


def test_the_speech_encoder_learns_and_leaves_its_head_behind(data, tmp_path):
  config = settings.speech_config()
  config.whisper.update(d_model=16, encoder_attention_heads=1, encoder_ffn_dim=16)
  config.total_steps = config.eval_every = config.checkpoint_every = 12
  config.log_every = 1
  config.batch_size = 1
  config.optim.warmup = 1
  config.optim.lr = 3e-2
  config.data.dataset = str(data)
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  loop.train(SpeechTask, config, tmp_path, mesh=mesh)

  _, params = bundle.load_component(tmp_path / 'model', 'whisper')
  assert not [name for name in params if 'phoneme' in name]
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  losses = [json.loads(line).get('train/loss') for line in lines]
  losses = [loss for loss in losses if loss is not None]
  assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize('name', settings.CONFIGS)
def test_configurations_are_legal_and_their_networks_fit(name):
  config = settings.CONFIGS[name]()
  config_checks.loop(config)
  if name in ('embedder', 'diffusion'):
    getattr(config_checks, name)(config)
    assert task_class(name).name == name
  if name == 'embedder':
    assert config.embedder.whisper_dim == settings.SPEECH_WIDTH
  if name == 'diffusion':
    assert config.audio_linear.channels == settings.SPEECH_WIDTH

"""Every preset makes a training step: the whole step is traced, not compiled."""

import functools

import jax
import pytest

from benchmarks.memory_table import batch_shapes
from configs import diffusion, embedder
from dicetalk_jax import parallel
from dicetalk_jax.models import parameters
from dicetalk_jax.training.diffusion import TRAINED, DiffusionTask
from dicetalk_jax.training.diffusion_loss import DiffusionLoss
from dicetalk_jax.training.embedder import EmbedderTask
from dicetalk_jax.training.optimizer import make_optimizer
from dicetalk_jax.training.state import init_state, partition
from dicetalk_jax.training.step import make_train_step
from tests import tiny


def metrics_of_a_step(task, params, batch):
  """Traces the training step that the loop makes.

  Returns:
    The shapes of the metrics, by name.
  """
  config = task.config
  mesh = parallel.make_mesh(devices=jax.devices()[:1])

  def loss(params, held, *args):
    return task.loss({**held, **params}, *args)

  with jax.set_mesh(mesh):
    trained, held = partition(
      params, config.trainable, sets=task.sets, constants=task.constants
    )
    tx = make_optimizer(config.optim, config.total_steps, task.new_modules)
    state = jax.eval_shape(
      functools.partial(init_state, tx=tx, ema=True, extra=task.extra_state), trained
    )
    step = make_train_step(
      loss,
      tx,
      parallel.shardings(state, mesh),
      ema=0.9,
      after_update=task.after_update,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    after, metrics = jax.eval_shape(step, state, held, batch, key)
  assert shapes_and_types(after) == shapes_and_types(state)
  return metrics


def shapes_and_types(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def smallest_config(arg):
  """A preset of the diffusion task with the smallest models."""
  config = diffusion.get_config(arg)
  for name in TRAINED:
    if name in config:
      config[name].update(tiny.CONFIGS[name])
  if 'emo_model' in config:
    config.emo_model.num_classes = 22
  config.unet.update(in_channels=8, out_channels=4)
  config.optim.name = 'adam'
  config.data.size = 16
  return config


@pytest.mark.parametrize('name', ['', *diffusion.VARIANTS])
def test_every_diffusion_preset_makes_a_step(name):
  plain = smallest_config('tiny')
  config = smallest_config(f'tiny,{name}'.strip(','))
  components = {
    name: tiny.component(name, config[name].to_dict())
    for name in TRAINED
    if name in config
  }
  graphdefs = {name: made.graphdef for name, made in components.items()}
  params = {}
  for prefix, made in components.items():
    params |= parameters.add_prefix(prefix, made.params)

  task = DiffusionTask.__new__(DiffusionTask)  # without data and frozen networks
  task.config = config
  task.has_emotion = 'emo_model' in config
  task._loss = DiffusionLoss(config, graphdefs, 1.0)

  batch = batch_shapes(plain)
  rows = plain.batch_size
  # Latents have half the side of the images.
  latents = (rows, plain.data.frames, 8, 8, 4)
  batch['latents'] = jax.ShapeDtypeStruct(latents, 'float32')
  batch['reference'] = jax.ShapeDtypeStruct((rows, 8, 8, 4), 'float32')

  metrics = metrics_of_a_step(task, params, batch)
  has_bank = task.has_emotion and config.emo_model.mode == 'bank'
  assert ('vq' in metrics) == has_bank
  assert ('bank_perplexity' in metrics) == has_bank


@pytest.mark.parametrize('name', ['', *embedder.VARIANTS])
def test_every_embedder_preset_makes_a_step(name):
  config = embedder.get_config(f'tiny,{name}'.strip(','))
  made = tiny.component('embedder', config.embedder.to_dict())
  task = EmbedderTask.__new__(EmbedderTask)  # without data and frozen networks
  task.config = config
  task.graphdef = made.graphdef

  sizes = config.embedder
  rows = config.batch_size
  frames = config.data.max_len
  states = (rows, 2 * frames, sizes.whisper_states, sizes.whisper_dim)
  if sizes.visual == 'crops':
    seen = (rows, frames, sizes.crop_size, sizes.crop_size, 3)
    seen_type = 'uint8'
  else:
    seen = (rows, frames, sizes.expr_dim)
    seen_type = 'float32'
  batch = {
    'expr': jax.ShapeDtypeStruct(seen, seen_type),
    'frame_mask': jax.ShapeDtypeStruct((rows, frames), bool),
    'whisper': jax.ShapeDtypeStruct(states, 'float16'),
  }
  for key in ('has_video', 'has_audio'):
    batch[key] = jax.ShapeDtypeStruct((rows,), bool)
  for key in ('dataset', 'identity', 'emotion', 'level', 'video'):
    batch[key] = jax.ShapeDtypeStruct((rows,), 'int32')

  params = parameters.add_prefix('embedder', made.params)
  metrics = metrics_of_a_step(task, params, batch)
  assert {'loss', 'sigma'} <= metrics.keys()

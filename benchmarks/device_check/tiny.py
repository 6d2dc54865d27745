"""Part `tiny`: ten steps of the smallest diffusion model through the real loop."""

import dataclasses
import math
import pathlib
import statistics
import tempfile
from typing import Any

import ml_collections

from benchmarks.device_check.parts import Context, Result
from configs import autoencoder, diffusion, embedder
from dicetalk_jax import bundle
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.training import loop
from dicetalk_jax.training.diffusion import DiffusionTask
from dicetalk_jax.training.run_log import read_json_lines

STEPS = 10
REDUCED_IMAGE = 32  # side in pixels
# Two levels and Adam: compiling the preset takes minutes on a CPU.
SMALLER = {
  'optim.name': 'adam',
  'batch_size': 2,
  'data.frames': 3,
  'data.size': REDUCED_IMAGE,
  'unet.num_frames': 3,
  'unet.block_out_channels': (32, 32),
  'unet.num_attention_heads': (1, 2),
  'unet.down_block_types': (
    'CrossAttnDownBlockSpatioTemporal',
    'DownBlockSpatioTemporal',
  ),
  'unet.up_block_types': ('UpBlockSpatioTemporal', 'CrossAttnUpBlockSpatioTemporal'),
  'emo_model.classifier_in': 32,
  'sample.num_steps': 2,
}


def train_tiny_model(context: Context) -> Result:
  """Makes data and a model folder with random frozen parts, and trains on them."""
  with tempfile.TemporaryDirectory() as folder:
    rows = train(pathlib.Path(folder), context.reduced)

  losses = [row['train/loss'] for row in rows if 'train/loss' in row]
  if len(losses) != STEPS or not all(map(math.isfinite, losses)):
    raise ArithmeticError(f'expected {STEPS} finite losses, got {losses}')
  name = 'train/steps_per_second'
  rates = [row[name] for row in rows if name in row]
  step_ms = 1e3 / statistics.median(rates)
  return {
    'losses': losses,
    'falling': losses[-1] < losses[0],
    'step_ms': step_ms,
    'summary': f'loss {losses[0]:.3g} to {losses[-1]:.3g} in {STEPS} steps, '
    f'{step_ms:.0f} ms each',
  }


def train(folder: pathlib.Path, reduced: bool) -> list[dict[str, Any]]:
  """Trains inside `folder`; returns the lines of the log."""
  # TFDS is needed here only.
  from data_pipelines.builders.synthetic import prepare_synthetic
  from data_pipelines.builders.synthetic_clips import TINY

  config = config_for(folder, reduced)
  make_model(folder / 'model', config)
  size = REDUCED_IMAGE if reduced else TINY.size
  settings = dataclasses.replace(TINY, size=size, train=2, val=2, test=0)
  prepare_synthetic(config.data.dir, settings, workers=1)
  loop.train(DiffusionTask, config, folder / 'run')
  return read_json_lines(folder / 'run' / 'metrics.jsonl')


def config_for(folder: pathlib.Path, reduced: bool) -> ml_collections.ConfigDict:
  """`configs/diffusion.py:tiny` with all folders inside `folder` and little data."""
  config = diffusion.get_config('tiny')
  config.total_steps = STEPS
  config.eval_every = STEPS
  config.checkpoint_every = STEPS
  config.log_every = 1
  config.model = str(folder / 'model')
  config.data.dir = str(folder / 'data')
  if reduced:
    config.update_from_flattened_dict(SMALLER)
  return config


def make_model(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """The frozen parts that the task reads, with random values."""
  sections = {
    'vae': autoencoder.get_config('tiny').vae,
    'embedder': embedder.get_config('tiny').embedder,
    'whisper': config.frozen.whisper,
    'image_encoder': config.frozen.image_encoder,
  }
  for name, section in sections.items():
    values = registry.config_of(name, section.to_dict()).to_json()
    _, target = parameters.abstract(registry.builder(name, values))
    params = parameters.numpy_params(target)
    bundle.save_component(folder, name, values, params, {'source': 'random'})

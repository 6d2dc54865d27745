"""Part `tiny`: ten steps of the smallest diffusion model through the real loop."""

import dataclasses
import math
import pathlib
import statistics
import tempfile
from typing import Any

import ml_collections

from benchmarks.device_check.parts import Context
from configs import autoencoder, diffusion, embedder
from dicetalk_jax import bundle
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.training import loop
from dicetalk_jax.training.diffusion import DiffusionTask
from dicetalk_jax.training.run_log import read_json_lines

STEPS = 10
# Two levels and Adam: compiling the preset takes minutes on a CPU.
SMALLER = {
  'optim.name': 'adam',
  'batch_size': 2,
  'data.frames': 3,
  'data.size': 32,
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


def run(context: Context) -> dict[str, Any]:
  """Makes data and a model folder with random frozen parts, and trains on them."""
  # TFDS is needed here only.
  from data_pipelines.builders.synthetic import prepare_synthetic
  from data_pipelines.builders.synthetic_clips import TINY

  with tempfile.TemporaryDirectory() as place:
    folder = pathlib.Path(place)
    config = config_for(folder, context.reduced)
    make_model(folder / 'model', config)
    size = 32 if context.reduced else TINY.size
    settings = dataclasses.replace(TINY, size=size, train=2, val=2, test=0)
    prepare_synthetic(config.data.dir, settings, workers=1)
    loop.train(DiffusionTask, config, folder / 'run')
    rows = read_json_lines(folder / 'run' / 'metrics.jsonl')

  steps = [row for row in rows if 'train/loss' in row]
  losses = [row['train/loss'] for row in steps]
  if len(losses) != STEPS or not all(map(math.isfinite, losses)):
    raise ArithmeticError(f'{STEPS} finite losses expected, not {losses}')
  rates = [
    row['train/steps_per_second'] for row in steps if 'train/steps_per_second' in row
  ]
  median = 1e3 / statistics.median(rates)
  return {
    'losses': losses,
    'falling': losses[-1] < losses[0],
    'step_ms': median,
    'summary': f'loss {losses[0]:.3g} to {losses[-1]:.3g} in {STEPS} steps, '
    f'{median:.0f} ms each',
  }


def config_for(folder: pathlib.Path, reduced: bool) -> ml_collections.ConfigDict:
  """`configs/diffusion.py:tiny` with all folders inside `folder` and little data."""
  config = diffusion.get_config('tiny')
  config.total_steps = config.eval_every = config.checkpoint_every = STEPS
  config.log_every = 1
  config.model, config.data.dir = str(folder / 'model'), str(folder / 'data')
  if reduced:
    config.update_from_flattened_dict(SMALLER)
  return config


def make_model(folder: pathlib.Path, config: ml_collections.ConfigDict) -> None:
  """The frozen parts that the task reads, with random values."""
  parts = {
    'vae': autoencoder.get_config('tiny').vae,
    'embedder': embedder.get_config('tiny').embedder,
    'whisper': config.frozen.whisper,
    'image_encoder': config.frozen.image_encoder,
  }
  for name, section in parts.items():
    values = registry.config_of(name, section.to_dict()).to_json()
    params = parameters.numpy_params(
      parameters.abstract(registry.builder(name, values))[1]
    )
    bundle.save_component(folder, name, values, params, {'source': 'random'})

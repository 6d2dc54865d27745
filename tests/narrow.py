"""The configurations of `configs/` at the sizes of `tests.convert.published_folders`.

--config=tests/narrow.py:diffusion:paper_strict
"""

import importlib

import ml_collections

from tests.convert import published_folders


def get_config(arg: str) -> ml_collections.ConfigDict:
  """Returns the configuration `TASK:PRESETS`, narrow."""
  task, _, presets = arg.partition(':')
  config = importlib.import_module(f'configs.{task}').get_config(presets or 'default')
  config.total_steps = 2
  config.log_every = 1
  config.optim.warmup = 1
  config.dtype = 'float32'
  {'embedder': _embedder, 'diffusion': _diffusion}[task](config)
  return config


def _embedder(config: ml_collections.ConfigDict) -> None:
  whisper = published_folders.WHISPER
  config.embedder.update(
    whisper_dim=whisper['d_model'],
    whisper_states=whisper['encoder_layers'] + 1,
    width=16,
    heads=2,
    mlp_dim=16,
    visual_layers=1,
    audio_layers=1,
    fusion_layers=1,
    max_len=50,
  )
  few_people(config)


def few_people(config: ml_collections.ConfigDict) -> None:
  """Draws groups that `benchmarks.imitated_corpora` has."""
  config.data.update(identities=2, emotions=2, clips=2, videos=2, max_len=50)
  config.batch_size = 12


def _diffusion(config: ml_collections.ConfigDict) -> None:
  unet = published_folders.UNET
  width = unet['cross_attention_dim']
  whisper = published_folders.WHISPER
  config.batch_size = 2
  config.data.update(frames=13, size=32)  # few windows
  config.remat = 'none'
  config.unet.update(
    {key: tuple(x) if isinstance(x, list) else x for key, x in unet.items()}
  )
  config.audio_linear.update(
    blocks=whisper['encoder_layers'] + 1,
    channels=whisper['d_model'],
    intermediate_dim=16,
    output_dim=width,
    context_tokens=2,
  )
  config.pose_guider.update(
    conditioning_embedding_channels=unet['block_out_channels'][0],
    block_out_channels=(4, 4),
  )
  config.emo_model.update(
    prior_dim=16,
    dim=width,
    intermediate_dim=16,
    tokens=2,
    num_heads=2,
    classifier_in=unet['block_out_channels'][-1],
    classifier_hidden=(8, 8),
  )

"""How the demo model is trained: the tiny presets, with what was changed and why."""

from collections.abc import Callable

import ml_collections

from configs import autoencoder, common, diffusion, embedder

# How many shards of the training set each part sees, see `demo_data.SHARD`. What the
# last two read is computed first, which takes minutes per shard.
SHARDS = {'autoencoder': 8, 'speech': 8, 'embedder': 6, 'diffusion': 6}
# Of each part on two cores with nothing else running, the features that it reads
# included.
EXPECTED_MINUTES = {
  'data': 6,
  'autoencoder': 15,
  'speech': 7,
  'embedder': 6,
  'diffusion': 75,
}
SPEECH_WIDTH = 96
SPEECH = dict(
  d_model=SPEECH_WIDTH,
  encoder_layers=1,
  encoder_attention_heads=4,
  encoder_ffn_dim=192,
)


def autoencoder_config() -> ml_collections.ConfigDict:
  """Colour and sharpness of everything behind it end here."""
  config = autoencoder.get_config('tiny')
  config.total_steps = 3000
  config.batch_size = 8
  config.vae.block_out_channels = (24, 48, 64)
  config.loss.kl = 1e-3
  config.optim.ema = 0.995
  config.eval_every = 500
  config.checkpoint_every = 500
  return config


def speech_config() -> ml_collections.ConfigDict:
  """See `speech.SpeechTask`."""
  config = common.training('speech')
  common.tiny(config)
  del config.frozen
  config.whisper = SPEECH
  config.total_steps = 500
  config.batch_size = 4
  config.optim.name = 'adam'
  config.optim.lr = 3e-3
  config.optim.schedule = 'cosine'
  config.optim.ema = 0.0
  config.eval_every = 500
  config.checkpoint_every = 100
  return config


def embedder_config() -> ml_collections.ConfigDict:
  """Twice the tiny batch, and more steps: the training set is larger."""
  config = embedder.get_config('tiny')
  config.embedder.whisper_dim = SPEECH_WIDTH
  config.total_steps = 500
  config.batch_size = 64
  config.data.identities = 8
  config.data.max_len = 30
  config.eval_every = 250
  config.checkpoint_every = 125
  return config


def diffusion_config() -> ml_collections.ConfigDict:
  """Long enough that unseen people keep their faces."""
  config = diffusion.get_config('tiny')
  config.audio_linear.channels = SPEECH_WIDTH
  config.total_steps = 6000
  config.batch_size = 16
  config.optim.ema = 0.998
  config.noise.p_mean = 0.2
  config.noise.p_std = 1.2
  config.noise.sigma_max = 20.0
  config.log_every = 50
  config.eval_every = 1500
  config.checkpoint_every = 300
  return config


# What each part leaves in its model folder when it has finished.
COMPONENTS = {
  'autoencoder': 'vae',
  'speech': 'whisper',
  'embedder': 'embedder',
  'diffusion': 'unet',
}
# In this order: each task reads the model of the one before.
CONFIGS: dict[str, Callable[[], ml_collections.ConfigDict]] = {
  'autoencoder': autoencoder_config,
  'speech': speech_config,
  'embedder': embedder_config,
  'diffusion': diffusion_config,
}

r"""The temporal autoencoder.

  python -m dicetalk_jax.main --config=configs/autoencoder.py:tiny --workdir=runs/vae
  python -m dicetalk_jax.main --config=configs/autoencoder.py --config.init_from=MODEL \
      --config.data.dataset=DATA --workdir=runs/vae

DICE-Talk uses the published SVD autoencoder as it is, so there is no 'paper_strict'.
This task trains one where that is missing (the synthetic data set), or fine-tunes it.
"""

import ml_collections

from configs import common


def get_config(arg: str = 'default') -> ml_collections.ConfigDict:
  tiny, _ = common.presets(arg, {})
  config = common.training('autoencoder')
  config.batch_size = 8

  # Data.
  config.data.frames = 5  # consecutive ones: the decoder's temporal layers see them
  config.data.step = 2  # of the 25 fps source: the model's rate is 12.5 fps

  # Model.
  config.vae = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    layers_per_block=2,
    norm_num_groups=32,
    block_out_channels=(128, 256, 512, 512),
    scaling_factor=0.18215,
  )

  # Loss: absolute error, plus these terms with these weights.
  config.loss = dict(
    mse=2.0,
    kl=1e-6,
  )

  if tiny:
    common.tiny(config)
    config.batch_size = 4
    config.data.frames = 1
    config.total_steps = 800
    config.optim.lr = 4e-3
    config.optim.schedule = 'cosine'
    config.optim.ema = 0.99
    config.vae.layers_per_block = 1
    config.vae.norm_num_groups = 2
    config.vae.block_out_channels = (16, 16, 32)
    config.vae.latent_channels = 4
    config.loss.kl = 5e-3  # smooth latents: the tiny denoiser leaves some noise in them
    config.log_every = 50
    config.eval_every = 400
    config.checkpoint_every = 400
  return config

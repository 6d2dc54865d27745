"""Task: the temporal autoencoder (AutoencoderKLTemporalDecoder), from scratch or
fine-tuned.
"""

import os
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from dicetalk_jax import bundle, parallel
from dicetalk_jax.data.autoencoder_loader import frames_loader
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.media.contact_sheet import grid
from dicetalk_jax.models import parameters
from dicetalk_jax.models.parameters import Params
from dicetalk_jax.models.vae import VAEConfig
from dicetalk_jax.training import config_checks, datasets, gathering, init_from
from dicetalk_jax.training.run_log import Picture
from dicetalk_jax.training.task import Task


class AutoencoderTask(Task):
  """Reconstruction (absolute and squared error) plus a small KL term on the
  posterior.
  """

  name = 'autoencoder'

  def __init__(self, config: Any, mesh: Mesh, workdir: os.PathLike | str):
    super().__init__(config, mesh, workdir)
    self.start = init_from.folder(config, 'vae')
    self.build, self.graphdef, self.target = config_checks.structure(config, 'vae')
    self.train, self.val = datasets.open_train_and_val(config, self.data_dir)
    self.reconstruct = jax.jit(self._reconstruct)

  def trained(self) -> tuple[str, ...]:
    return ('vae',)

  def init(self, key: jax.Array) -> Params:
    """Returns parameters `vae.*`: from `init_from`, or drawn."""
    if self.start:
      params = init_from.load_initial(self.config, 'vae', self.target)
      return parameters.add_prefix('vae', params)
    params = parameters.init_params(self.build, key)
    # The posterior begins narrow: at deviation 1 its noise would drown the untrained
    # mean.
    log_variances = slice(self.config.vae.latent_channels, None)
    bias = params['quant_conv.bias']
    params['quant_conv.bias'] = bias.at[log_variances].set(-6.0)
    return parameters.add_prefix('vae', params)

  def loss(
    self, params: Params, batch: Any, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Returns the loss and its parts for `video` [B,F,H,W,3] in [-1,1]."""
    video = parallel.split_pictures(batch['video'])
    vae = self._vae(params)

    # 1. Encode, and draw latents from the posterior
    mean, logvar = vae.encode(_as_images(video))
    mean = mean.astype(jnp.float32)
    logvar = logvar.astype(jnp.float32)
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)

    # 2. Decode
    out = vae.decode(_as_clips(z, video)).astype(jnp.float32)

    # 3. Compare
    l1 = jnp.abs(out - video).mean()
    mse = jnp.square(out - video).mean()
    kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
    weights = self.config.loss
    total = l1 + weights.mse * mse + weights.kl * kl
    return total, {'l1': l1, 'mse': mse, 'kl': kl}

  def batches(self) -> grain.DatasetIterator:
    data = self.config.data
    index, count = parallel.batch_shard(self.mesh)
    return iter(
      frames_loader(
        self.train,
        batch=self.config.batch_size // count,
        frames=data.frames,
        step=data.step,
        seed=self.config.seed,
        shard=(index, count),
        workers=data.workers,
      )
    )

  def evaluate(self, params: Params) -> tuple[dict[str, float], dict[str, Picture]]:
    """Returns the PSNR in dB on unseen identities, and an image: truth above
    reconstruction.
    """
    data = self.config.data
    video = _first_batch(self.val, batch=8, frames=data.frames, step=data.step, seed=1)
    _, out = self.reconstruct(params, video)
    out = parallel.to_host(out)
    mse = float(np.mean((out - video) ** 2))
    rows = [video[:, 0], np.clip(out[:, 0], -1, 1)]
    return {'psnr': 10 * np.log10(4 / mse)}, {'reconstruction': grid(rows)}

  def export(self, params: Params) -> None:
    """Writes `vae` with a scaling factor, whatever `config.vae.scaling_factor` is.

    A fine-tuned autoencoder keeps that of `init_from`, which the denoisers trained on
    its latents expect. A new one gets the factor that gives its latents unit deviation.
    """
    if self.start:
      old = bundle.require(self.start, 'vae')['vae']['config']
      scaling_factor = VAEConfig.from_json(old).scaling_factor
    else:
      video = _first_batch(self.train, batch=32, frames=1, step=1, seed=2)
      latents, _ = self.reconstruct(params, video)
      factor = 1 / np.std(parallel.to_host(latents))
      # Five digits, like published factors: another device must not give another model.
      scaling_factor = float(f'{factor:.5g}')
    config = VAEConfig.from_json(
      self.config.vae.to_dict() | {'scaling_factor': scaling_factor}
    )
    bundle.save_component(
      self.model_dir,
      'vae',
      config.to_json(),
      parameters.strip_prefix('vae', params),
      init_from.provenance(self),
    )

  def _vae(self, params: Params) -> Any:
    return gathering.merge(self.graphdef, parameters.strip_prefix('vae', params))

  def _reconstruct(
    self, params: Params, video: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns mean latents [B*F,h,w,c] and the reconstructed video."""
    vae = self._vae(params)
    mean, _ = vae.encode(_as_images(video))
    return mean, vae.decode(_as_clips(mean, video)).astype(jnp.float32)


def _as_images(video: jax.Array) -> jax.Array:
  """[B,F,...] to [B*F,...]."""
  return video.reshape(-1, *video.shape[2:])


def _as_clips(images: jax.Array, video: jax.Array) -> jax.Array:
  """[B*F,...] to [B,F,...], with B and F of a video."""
  return images.reshape(*video.shape[:2], *images.shape[1:])


def _first_batch(parts: list[DatasetPart], **settings: Any) -> np.ndarray:
  """The `video` of the first batch of `frames_loader`."""
  batches = frames_loader(parts, **settings)
  return next(iter(batches))['video']

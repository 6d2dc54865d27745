"""Task: the temporal autoencoder (AutoencoderKLTemporalDecoder), from scratch or
fine-tuned.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dicetalk_jax import bundle, parallel
from dicetalk_jax.data.autoencoder_loader import frames_loader
from dicetalk_jax.media.contact_sheet import grid
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.training import datasets, init_from
from dicetalk_jax.training.task import Task


class AutoencoderTask(Task):
  """Reconstruction (absolute and squared error) plus a small KL term on the
  posterior.
  """

  name = 'autoencoder'

  def __init__(self, config, mesh, workdir):
    super().__init__(config, mesh, workdir)
    self.build = registry.builder('vae', config.vae.to_dict(), config.dtype)
    self.graphdef, self.target = parameters.abstract(self.build)
    self.train, self.val = datasets.open_train_and_val(config, self.data_dir)
    self.reconstruct = jax.jit(self._reconstruct)

  def trained(self) -> tuple[str, ...]:
    return ('vae',)

  def init(self, key: jax.Array) -> parameters.Params:
    """Parameters `vae.*`: from `init_from`, or drawn."""
    if self.config.init_from:
      return parameters.add_prefix(
        'vae', init_from.load_initial(self.config, 'vae', self.target)
      )
    params = parameters.init_params(self.build, key)
    # The posterior begins narrow: at deviation 1 its noise would drown the untrained
    # mean.
    params['quant_conv.bias'] = (
      params['quant_conv.bias'].at[self.config.vae.latent_channels :].set(-6.0)
    )
    return parameters.add_prefix('vae', params)

  def loss(self, params, frozen, batch, key, step):
    """Scalar loss and its parts for `video` [B,F,H,W,3] in [-1,1]."""
    video = parallel.split_pictures(batch['video'])
    vae = parameters.merge(self.graphdef, parameters.strip_prefix('vae', params))
    mean, logvar = vae.encode(video.reshape(-1, *video.shape[2:]))
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    out = vae.decode(z.reshape(*video.shape[:2], *z.shape[1:])).astype(jnp.float32)
    l1, mse = jnp.abs(out - video).mean(), jnp.square(out - video).mean()
    kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
    weights = self.config.loss
    total = l1 + weights.mse * mse + weights.kl * kl
    return total, {'l1': l1, 'mse': mse, 'kl': kl}

  def batches(self):
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

  def _reconstruct(self, params, video):
    vae = parameters.merge(self.graphdef, parameters.strip_prefix('vae', params))
    mean, _ = vae.encode(video.reshape(-1, *video.shape[2:]))
    return mean, vae.decode(mean.reshape(*video.shape[:2], *mean.shape[1:])).astype(
      jnp.float32
    )

  def evaluate(self, params, frozen) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """PSNR in dB on unseen identities, and a picture: truth above reconstruction."""
    video = next(
      iter(
        frames_loader(
          self.val,
          batch=8,
          frames=self.config.data.frames,
          step=self.config.data.step,
          seed=1,
        )
      )
    )['video']
    out = parallel.to_host(self.reconstruct(params, video)[1])
    mse = float(np.mean((out - video) ** 2))
    rows = [video[:, 0], np.clip(out[:, 0], -1, 1)]
    return {'psnr': 10 * np.log10(4 / mse)}, {'reconstruction': grid(rows)}

  def export(self, params) -> None:
    """Writes `vae` with a scaling factor, whatever `config.vae.scaling_factor` is.

    That of `init_from`, which the denoisers trained on such latents expect; of a new
    one what gives its latents unit deviation.
    """
    if self.config.init_from:
      old = bundle.require(self.config.init_from, 'vae')['vae']['config']
      scaling_factor = registry.config_of('vae', old).scaling_factor
    else:
      batch = next(iter(frames_loader(self.train, batch=32, frames=1, step=1, seed=2)))[
        'video'
      ]
      measured = 1 / np.std(parallel.to_host(self.reconstruct(params, batch)[0]))
      # Five digits, as those published have: another device must not give another
      # model.
      scaling_factor = float(f'{measured:.5g}')
    config = registry.config_of(
      'vae', self.config.vae.to_dict() | {'scaling_factor': scaling_factor}
    )
    bundle.save_component(
      self.model_dir,
      'vae',
      config.to_json(),
      parameters.strip_prefix('vae', params),
      init_from.provenance(self),
    )

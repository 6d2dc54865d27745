"""The loss of the diffusion task around a toy network, and batches for it."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import diffusion
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.models.attention import KeyValue
from dicetalk_jax.training.diffusion_loss import DiffusionLoss

# Rows, frames, side and channels of the latents, width of the tokens.
B, F, H, C, D = 4, 3, 4, 2, 8
SIZES = {
  'audio_linear': dict(
    seq_len=10, blocks=2, channels=3, intermediate_dim=6, output_dim=D, context_tokens=2
  ),
  'pose_guider': dict(conditioning_embedding_channels=C, block_out_channels=(2, 2)),
  'emo_model': dict(
    prior_dim=6,
    dim=D,
    intermediate_dim=6,
    tokens=2,
    codebook_size=5,
    num_heads=2,
    classifier_in=C,
    classifier_hidden=(4, 4),
    num_classes=22,
    dropout=0.0,
  ),
}
# Draws of condition dropout, and what they leave out at the default rates.
DROP_NOTHING = 0.99
DROP_IMAGE = 0.07
DROP_EMOTION = 0.12

# Two programs may round differently.
near = functools.partial(pytest.approx, rel=1e-5)


class ToyNetwork(nnx.Module):
  """Depends on every input of the UNet: sample, noise level, contexts, face."""

  def __init__(self, *, rngs):
    def draw(*shape):
      return nnx.Param(jax.random.normal(rngs.params(), shape) * 0.4)

    self.mix = draw(2 * C, C)
    self.key = draw(3, D, C)

  def context_kv(self, *contexts):
    pairs = []
    for context, weights in zip(contexts, self.key[...]):
      if context is None:
        pairs.append(None)
      else:
        key = context @ weights
        pairs.append(KeyValue(key, jnp.tanh(key)))
    return {'attn2': tuple(pairs)}

  def __call__(
    self, sample, timestep, kv, ids, spatial_condition=None, masks=None, remat='none'
  ):
    x = sample @ self.mix[...]
    if spatial_condition is not None:
      x += spatial_condition
    for pair in kv['attn2']:
      if pair is not None:
        key, value = pair
        x += (key * value).mean(-2)[:, :, None, None]
    x += 0.1 * timestep[:, None, None, None, None]
    x += 0.01 * ids.sum(-1)[:, None, None, None, None]
    x = jnp.tanh(x)
    return x, x


def make_loss(arg='default', network=ToyNetwork, **changes):
  """The loss of a preset around a network.

  Args:
    arg: the preset.
    network: builds the network.
    **changes: of the settings, written `section__key`.

  Returns:
    The loss, its parameters, and the loss as one program.
  """
  config = diffusion.get_config(arg)
  for name, values in SIZES.items():
    if name in config:
      config[name].update(values)
  config.unet.block_out_channels = (C,)
  config.update_from_flattened_dict(
    {key.replace('__', '.'): value for key, value in changes.items()}
  )
  return _made(ml_collections.FrozenConfigDict(config), network)


@functools.cache
def _made(config, network):
  builds = {
    name: registry.builder(name, config[name].to_dict())
    for name in SIZES
    if name in config
  }
  builds['unet'] = network
  graphdefs = {}
  shapes = {}
  for name, build in builds.items():
    graphdefs[name], target = parameters.abstract(build)
    shapes |= parameters.add_prefix(name, target)
  loss = DiffusionLoss(config, graphdefs, scaling_factor=0.5)
  return loss, parameters.numpy_params(shapes), jax.jit(loss)


def batch(draw=DROP_NOTHING, **changes):
  """A batch whose rows all have the same draw of condition dropout."""

  def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)

  mask = np.zeros((B, 2 * H, 2 * H), np.float32)
  mask[:, 2:7, 1:6] = 1
  return {
    'latents': normal(0, B, F, H, H, C),
    'reference': normal(1, B, H, H, C),
    'image_token': normal(2, B, 1, D),
    'audio': normal(3, B, F, 10, 2, 3),
    'mu': normal(4, B, 6),
    'sigma': np.abs(normal(5, B, 6)),
    'mask': mask,
    'emotion_class': np.array([0, 5, -1, 21], np.int32),
    'buckets': np.ones((B, 2), np.float32),
    'drop': np.full(B, draw, np.float32),
  } | changes

"""The VAE: live parity with diffusers, training, precision.

The recorded numbers are in `tests/convert/test_verify.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dicetalk_jax.models import parameters
from dicetalk_jax.models.parameters import merge
from dicetalk_jax.models.vae import VAE, VAEConfig
from tests.models import parity

TINY = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


def test_twin():
  """Outputs and all gradients equal those of diffusers, with two stages."""
  import diffusers
  import torch

  torch.manual_seed(0)
  theirs = diffusers.AutoencoderKLTemporalDecoder(
    block_out_channels=(32, 64),
    down_block_types=('DownEncoderBlock2D',) * 2,
    layers_per_block=2,
  ).eval()
  config = VAEConfig.from_json(theirs.config | {'block_out_channels': [32, 64]})
  graphdef, params = parity.converted(config, VAE, parity.lively(theirs))
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  image, z = draw(2, 16, 24, 3), draw(1, 3, 8, 12, 4)
  weigh_mean, weigh_logvar, weigh_frames = (
    draw(2, 8, 12, 4),
    draw(2, 8, 12, 4),
    draw(1, 3, 16, 24, 3),
  )

  def to_torch(x):
    return torch.tensor(
      parity.channels_first(x).reshape(-1, x.shape[-1], *x.shape[-3:-1])
    )

  their_image, their_z = to_torch(image).requires_grad_(), to_torch(z).requires_grad_()
  latents = theirs.encode(their_image).latent_dist
  their_frames = theirs.decode(their_z, num_frames=3).sample
  loss = sum(
    (x * to_torch(w)).sum()
    for x, w in (
      (latents.mean, weigh_mean),
      (latents.logvar, weigh_logvar),
      (their_frames, weigh_frames),
    )
  )
  loss.backward()

  def ours(params, image, z):
    model = merge(graphdef, params)
    return *model.encode(image), model.decode(z)

  def weighed(params, image, z):
    outputs = ours(params, image, z)
    return sum(
      jnp.vdot(x, w) for x, w in zip(outputs, (weigh_mean, weigh_logvar, weigh_frames))
    ), outputs

  with jax.default_matmul_precision('highest'):
    outputs, grads, (of_image, of_z) = parity.jax_gradients(weighed, params, image, z)
  mean, logvar, frames = (parity.channels_first(x) for x in outputs)
  assert parity.error(mean, latents.mean.detach()) < 3e-5
  assert parity.error(logvar, latents.logvar.detach()) < 3e-5
  assert parity.error(frames[0], their_frames.detach()) < 2e-4
  assert parity.error(parity.channels_first(of_image), their_image.grad) < 1e-4
  assert parity.error(parity.channels_first(of_z)[0], their_z.grad) < 1e-4
  assert parity.gradient_error(grads, theirs) < 1e-4


def test_trains_from_scratch():
  build = functools.partial(
    VAE, dataclasses.replace(TINY, block_out_channels=(8,))
  )  # compiles fastest
  graphdef, _ = parameters.abstract(build)
  params = parity.jit(
    lambda key: parameters.split(build(rngs=parameters.ParamKeys(key)))[1]
  )(jax.random.key(0))
  ramp = np.linspace(-1, 1, 16, dtype=np.float32)
  clip = np.stack(
    [np.broadcast_to(c * ramp[:, None], (16, 16)) for c in (1, -1, 0.5)], axis=-1
  )
  clip = jnp.asarray(np.stack([clip, clip.swapaxes(0, 1)])[None])  # [1,2,16,16,3]

  def loss(params):
    model = merge(graphdef, params)
    mean, _ = model.encode(clip[0])
    return jnp.mean((model.decode(mean[None]) - clip) ** 2)

  optimizer = optax.sign_sgd(2e-3)

  # not a scan: on CPU, gradients of convolutions are many times slower inside a loop
  @parity.jit
  def step(params):
    value, grad = jax.value_and_grad(loss)(params)
    updates, _ = optimizer.update(grad, optimizer.init(params), params)
    return optax.apply_updates(params, updates), value

  losses = []
  for _ in range(40):
    params, value = step(params)
    losses.append(float(value))
  assert losses[0] < 10 and losses[-1] < 0.1 * losses[0]


def test_config_keeps_what_the_published_file_says():
  written = TINY.to_json()
  assert written['down_block_types'] == ('DownEncoderBlock2D',) * 2
  assert VAEConfig.from_json(written) == TINY


def test_full_size():
  graphdef, params = parity.abstract(VAEConfig(), VAE)

  def like(*shape):
    return jax.ShapeDtypeStruct(shape, 'float32')

  mean, logvar = jax.eval_shape(
    lambda p, x: merge(graphdef, p).encode(x), params, like(1, 512, 512, 3)
  )
  assert mean.shape == logvar.shape == (1, 64, 64, 4)
  frames = jax.eval_shape(
    lambda p, z: merge(graphdef, p).decode(z), params, like(1, 10, 64, 64, 4)
  )
  assert frames.shape == (1, 10, 512, 512, 3)


def test_compute_dtype():
  graphdef, target = parity.abstract(TINY, VAE, dtype=jnp.bfloat16)

  def like(*shape):
    return jax.ShapeDtypeStruct(shape, 'float32')

  mean, _ = jax.eval_shape(
    lambda p, x: merge(graphdef, p).encode(x), target, like(1, 16, 16, 3)
  )
  frames = jax.eval_shape(
    lambda p, z: merge(graphdef, p).decode(z), target, like(1, 2, 8, 8, 4)
  )
  assert mean.dtype == jnp.float32 and frames.dtype == jnp.bfloat16

"""Parts `denoise` and `decode`: the two networks that make a video, by the clock."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import arithmetic, denoising_step
from benchmarks.denoising_step import Fill, Sizes, as_dtype, device_params, make_step
from benchmarks.device_check import floors
from benchmarks.device_check.measure import check_finite, compiled, peak_gib
from benchmarks.device_check.parts import Context
from benchmarks.timing import laps
from dicetalk_jax.models import parameters
from dicetalk_jax.models.unet import UNetConfig
from dicetalk_jax.models.vae import VAE, VAEConfig

# Few layers, since compiling takes the time.
SMALL_UNET = UNetConfig(
  block_out_channels=(32, 64),
  layers_per_block=1,
  num_attention_heads=(2, 2),
  cross_attention_dim=64,
  addition_time_embed_dim=16,
  projection_class_embeddings_input_dim=48,
  down_block_types=('CrossAttnDownBlockSpatioTemporal', 'DownBlockSpatioTemporal'),
  up_block_types=('UpBlockSpatioTemporal', 'CrossAttnUpBlockSpatioTemporal'),
)
SMALL_VAE = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)
REDUCED = Sizes(SMALL_UNET, rows=3, frames=8, side=16, dtype=jnp.float32)


def fill_for(context: Context) -> Fill:
  """The quickest way to fill parameters: on the device where there are many."""
  return parameters.numpy_params if context.reduced else device_params


def denoise(context: Context) -> dict[str, Any]:
  """One evaluation of the UNet: three guidance rows of a window."""
  sizes = REDUCED if context.reduced else denoising_step.FULL
  step = make_step(sizes, fill_for(context))
  facts = {
    'sizes': f'{sizes.rows} rows x {sizes.frames} frames, {sizes.side} x {sizes.side}',
  }
  if not context.reduced:
    facts['tflop_as_published'] = denoising_step.PUBLISHED_TFLOP
  return facts | _timed(context, step.call, step.params, *step.inputs)


def decode(context: Context) -> dict[str, Any]:
  """One chunk of frames from latents to pixels."""
  config = SMALL_VAE if context.reduced else VAEConfig()
  frames, side, dtype = (
    (3, 32, jnp.float32) if context.reduced else (10, 64, jnp.bfloat16)
  )
  size = side * 2 ** (len(config.block_out_channels) - 1)
  graphdef, target = parameters.abstract(functools.partial(VAE, config, dtype=dtype))
  params = fill_for(context)(as_dtype(target, dtype))
  shape = (1, frames, side, side, config.latent_channels)
  latents = jax.random.normal(jax.random.key(1), shape, dtype)
  call = jax.jit(lambda params, z: parameters.merge(graphdef, params).decode(z))
  facts = {'sizes': f'{frames} frames of {size} x {size}'}
  return facts | _timed(context, call, params, latents)


def _timed(
  context: Context, function: Any, params: parameters.Params, *args: Any
) -> dict[str, Any]:
  """Compiles, checks and times `function(params, *args)`."""
  jax.block_until_ready((params, args))
  tflop = arithmetic.tflop(function, params, *args)
  program = compiled(function, params, *args)
  context.save(program.facts())
  check_finite(program.call(params, *args), 'the output')

  def call():
    return jax.block_until_ready(program.call(params, *args))

  repeats = 5 if context.reduced else 20
  times = floors.against(tflop, laps(call, repeats), floors.here(context.out))
  return (
    program.facts()
    | times
    | peak_gib()
    | {
      'dtype': next(iter(params.values())).dtype.name,
      'parameters_millions': sum(math.prod(x.shape) for x in params.values()) / 1e6,
      'repeats': repeats,
      'summary': floors.sentence(times),
    }
  )

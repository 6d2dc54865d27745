"""Parts `denoise` and `decode`: the times of the two networks that make a video."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import arithmetic, denoising_step
from benchmarks.denoising_step import Fill, Sizes, as_dtype, device_params, make_step
from benchmarks.device_check import floors
from benchmarks.device_check.measure import check_finite, compile_program, peak_gib
from benchmarks.device_check.parts import Context, Result
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


class DecoderSizes(NamedTuple):
  """Sizes of one chunk: frames, and the side of the latents."""

  config: VAEConfig
  frames: int
  side: int
  dtype: Any


FULL_DECODER = DecoderSizes(VAEConfig(), frames=10, side=64, dtype=jnp.bfloat16)
REDUCED_DECODER = DecoderSizes(SMALL_VAE, frames=3, side=32, dtype=jnp.float32)


def fill_for(context: Context) -> Fill:
  """The quickest way to fill parameters: on the device if there are many."""
  return parameters.numpy_params if context.reduced else device_params


def denoise(context: Context) -> Result:
  """One evaluation of the UNet: three guidance rows of a window."""
  sizes = REDUCED if context.reduced else denoising_step.FULL
  step = make_step(sizes, fill_for(context))
  facts: Result = {
    'sizes': f'{sizes.rows} rows x {sizes.frames} frames, {sizes.side} x {sizes.side}',
  }
  if not context.reduced:
    facts['tflop_as_published'] = denoising_step.PUBLISHED_TFLOP
  return facts | _measure_network(context, step.call, step.params, *step.inputs)


def decode(context: Context) -> Result:
  """One chunk of frames from latents to pixels."""
  sizes = REDUCED_DECODER if context.reduced else FULL_DECODER
  build = functools.partial(VAE, sizes.config, dtype=sizes.dtype)
  graphdef, target = parameters.abstract(build)
  params = fill_for(context)(as_dtype(target, sizes.dtype))
  shape = (1, sizes.frames, sizes.side, sizes.side, sizes.config.latent_channels)
  latents = jax.random.normal(jax.random.key(1), shape, sizes.dtype)

  @jax.jit
  def decode_latents(params, latents):
    return parameters.merge(graphdef, params).decode(latents)

  pixels = sizes.side * 2 ** (len(sizes.config.block_out_channels) - 1)
  facts: Result = {'sizes': f'{sizes.frames} frames of {pixels} x {pixels}'}
  return facts | _measure_network(context, decode_latents, params, latents)


def _measure_network(
  context: Context, function: jax.stages.Wrapped, params: parameters.Params, *args: Any
) -> Result:
  """Compiles, checks and times `function(params, *args)`."""
  jax.block_until_ready((params, args))
  tflop = arithmetic.tflop(function, params, *args)

  # 1. Compile and check
  program = compile_program(function, params, *args)
  context.save(program.facts())
  check_finite(program.call(params, *args), 'the output')

  # 2. Measure
  def call():
    return jax.block_until_ready(program.call(params, *args))

  repeats = 5 if context.reduced else 20
  rates = floors.measured_rates(context.out)
  times = floors.compare_with_floors(tflop, laps(call, repeats), rates)

  # 3. Describe
  first = next(iter(params.values()))
  facts = {
    'dtype': first.dtype.name,
    'parameters_millions': sum(math.prod(x.shape) for x in params.values()) / 1e6,
    'repeats': repeats,
    'summary': floors.summary(times),
  }
  return program.facts() | times | peak_gib() | facts

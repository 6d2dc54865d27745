"""The programs to compile, on shapes of the published sizes."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import abstract_programs, denoising_step
from benchmarks.abstract_programs import Program, Shape
from benchmarks.denoising_step import as_dtype
from configs import diffusion
from dicetalk_jax import parallel
from dicetalk_jax.models import parameters, target
from dicetalk_jax.models.unet import UNet
from dicetalk_jax.models.vae import VAE, VAEConfig

DECODED_FRAMES = 10
PIXELS = 512
# Frames of the audio that the sampler is compiled for: two windows with the padding.
SAMPLED_FRAMES = 25


def denoise(platform: str, mesh: Mesh) -> Program:
  """One evaluation of the UNet: three guidance rows of a window."""
  sizes = denoising_step.FULL
  build = functools.partial(UNet, sizes.config, dtype=sizes.dtype)
  graphdef, shapes = parameters.abstract(build)
  params = as_dtype(shapes, sizes.dtype)

  def make_inputs(params: parameters.Params) -> denoising_step.Inputs:
    inputs, _ = denoising_step.make_inputs(graphdef, params, sizes)
    return inputs

  def step(params: parameters.Params, *inputs: Any) -> jax.Array:
    prediction, _ = parameters.merge(graphdef, params)(*inputs)
    return prediction

  with target.compiling_for(platform):
    inputs = jax.eval_shape(make_inputs, params)
  return _on(platform, mesh, step, params, *inputs)


def decode(platform: str, mesh: Mesh) -> Program:
  """One chunk of frames, from latents to pixels."""
  graphdef, params = _vae()

  def run(params: parameters.Params, latents: jax.Array) -> jax.Array:
    return parameters.merge(graphdef, params).decode(latents)

  side = PIXELS // 8
  latents = Shape((1, DECODED_FRAMES, side, side, 4), jnp.bfloat16)
  return _on(platform, mesh, run, params, latents)


def encode(platform: str, mesh: Mesh) -> Program:
  """Images to latents."""
  graphdef, params = _vae()

  def run(params: parameters.Params, images: jax.Array) -> Any:
    return parameters.merge(graphdef, params).encode(images)

  images = Shape((DECODED_FRAMES, PIXELS, PIXELS, 3), jnp.bfloat16)
  return _on(platform, mesh, run, params, images)


def _vae() -> tuple[Any, parameters.Abstract]:
  build = functools.partial(VAE, VAEConfig(), dtype=jnp.bfloat16)
  graphdef, shapes = parameters.abstract(build)
  return graphdef, as_dtype(shapes, jnp.bfloat16)


def sample(platform: str, mesh: Mesh) -> Program:
  """All steps of a clip of two windows."""
  with target.compiling_for(platform):
    stages = abstract_programs.Stages(abstract_programs.pipeline('dicetalk', mesh))
    conditions = stages.conditions(SAMPLED_FRAMES)
    stages.sample(_replicated(conditions, mesh))
  program = stages.programs['sample']
  return Program(program.run, _replicated(program.args, mesh), mesh)


def train(platform: str, mesh: Mesh, remat: str = 'block') -> Program:
  """One step of diffusion training, a clip for each device."""
  config = diffusion.get_config()
  config.batch_size = parallel.batch_devices(mesh)
  config.accum = 1
  config.remat = remat
  with target.compiling_for(platform):
    return abstract_programs.training(abstract_programs.diffusion, config, mesh)


def _on(platform: str, mesh: Mesh, function: Callable[..., Any], *args: Any) -> Program:
  """A function with all its arguments on all devices."""
  with target.compiling_for(platform):
    run = jax.jit(function, compiler_options=target.compiler_options())
  return Program(run, _replicated(args, mesh), mesh)


def _replicated(tree: Any, mesh: Mesh) -> Any:
  """Places shapes that have no place yet on all devices."""
  everywhere = NamedSharding(mesh, PartitionSpec())

  def place(x: Any) -> Any:
    if not hasattr(x, 'shape') or getattr(x, 'sharding', None) is not None:
      return x
    return Shape(x.shape, x.dtype, sharding=everywhere)

  return jax.tree.map(place, tree)


PARTS = {
  'denoise': denoise,
  'sample': sample,
  'decode': decode,
  'encode': encode,
  'train': train,
}

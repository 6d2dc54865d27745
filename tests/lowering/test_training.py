"""Full-size training steps of all tasks, lowered for NVIDIA GPUs and TPUs."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
import pytest

from benchmarks import abstract_programs
from configs import autoencoder, diffusion, embedder
from dicetalk_jax import parallel
from tests.lowering import programs
from tests.lowering.programs import ACCELERATORS, CUDNN, CUDNN_BACKWARD

AXES = ('data', 'fsdp', 'sequence')


# Small steps are lowered for TPUs in test_variants.py; this one takes half a minute.
PLATFORMS = ('cuda', pytest.param('tpu', marks=pytest.mark.slow))


@functools.cache
def diffusion_step(platform):
  """The step on one GPU, or on 32 x 2 TPUs that share the images."""
  if platform == 'tpu':
    mesh = AbstractMesh((1, 32, 2), AXES, (AxisType.Auto,) * 3)
  else:  # cuDNN's attention needs devices
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
  return abstract_programs.training(
    abstract_programs.diffusion, diffusion.get_config(), mesh
  )


@functools.cache
def lowered(platform):
  """The step as text."""
  return diffusion_step(platform).lower(platform)[0]


def test_diffusion_on_nvidia_fuses_attention_of_even_lengths():
  program = lowered('cuda')
  lengths = programs.fused_lengths(program)
  assert lengths[4096, 4096] > 0 and lengths[4096, 32] > 0
  assert not any(t % 2 or s % 2 for t, s in lengths)
  # 16 transformers, each with five attentions of even lengths; the emotion tokens.
  assert program.count(CUDNN_BACKWARD) == 16 * 5 + 1


@pytest.mark.slow
def test_diffusion_on_tpus_calls_nothing_of_nvidia():
  program = lowered('tpu')
  assert CUDNN not in program
  assert set(programs.custom_calls(program)) <= {'Sharding'}


def test_everything_large_is_born_in_64_parts():
  state, *_ = diffusion_step('tpu').args
  assert sum(x.size for x in state.params.values()) > 1.5e9
  moments = state.opt_state[1][0]
  for tree in (state.params, state.ema, moments.mu, moments.nu):
    assert tree.keys() == state.params.keys()
    for name, x in tree.items():
      assert x.sharding.spec == state.params[name].sharding.spec
      part = math.prod(x.sharding.shard_shape(x.shape))
      assert x.size < 2**18 or part == x.size // 64, name
  whole = sum(math.prod(x.shape) for x in jax.tree.leaves(state))
  part = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state))
  assert part < whole / 50


@pytest.mark.parametrize('platform', PLATFORMS)
def test_masters_are_float32_and_products_bfloat16(platform):
  state, *_ = diffusion_step(platform).args
  program = lowered(platform)
  assert {x.dtype for x in jax.tree.leaves(state)} == {
    jnp.dtype(jnp.float32),
    jnp.dtype(jnp.int32),
  }
  assert programs.number_of_products(program) > 1000
  # Float32 are masks and the look-up in the bank. Mixed is what flows back from the
  # float32 logits of attention.
  assert programs.share_of_products(program, {'bf16'}) > 0.9
  assert programs.share_of_products(program, {'f32'}) < 0.01


@pytest.mark.parametrize('platform', ACCELERATORS)
@pytest.mark.parametrize(
  ('make', 'config'),
  [
    (abstract_programs.autoencoder, autoencoder.get_config()),
    (abstract_programs.embedder, embedder.get_config()),
  ],
)
def test_steps_of_the_other_tasks_lower(make, config, platform):
  mesh = parallel.make_mesh()
  program, (state, metrics) = abstract_programs.training(make, config, mesh).lower(
    platform
  )
  assert CUDNN not in program  # heads are too wide, or masked
  assert set(programs.custom_calls(program)) <= {'Sharding'}
  assert state.params and metrics['loss'].dtype == jnp.float32
  assert programs.share_of_products(program, {'bf16'}) > 0.7

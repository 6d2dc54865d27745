"""Part `train`: one step of diffusion training, as the loop makes it, on one device."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from benchmarks import arithmetic
from benchmarks.denoising_step import Fill
from benchmarks.device_check import floors
from benchmarks.device_check.measure import check_finite, compile_program, peak_gib
from benchmarks.device_check.networks import fill_for
from benchmarks.device_check.parts import Context, Result
from benchmarks.device_check.tiny import SMALLER
from benchmarks.memory_table import diffusion_step
from benchmarks.timing import laps
from configs import diffusion
from dicetalk_jax import parallel
from dicetalk_jax.training.state import TrainState


def config_for(reduced: bool) -> ml_collections.ConfigDict:
  """One clip at full size, without accumulation; or the small model of the demo."""
  config = diffusion.get_config('tiny' if reduced else 'default')
  if reduced:
    config.update_from_flattened_dict(SMALLER)
    config.data.size = 64
    config.pose_guider.block_out_channels = (8, 8, 16, 16)  # latents an eighth as wide
  config.batch_size = 1
  config.accum = 1
  config.remat = 'block'
  return config


def train_step(context: Context) -> Result:
  """Loss, gradients, optimizer and EMA, with the state donated."""
  config = config_for(context.reduced)
  mesh = parallel.make_mesh(devices=jax.local_devices()[:1])
  with jax.set_mesh(mesh):
    # 1. Compile
    step, shapes = diffusion_step(config, mesh)
    abstract_state, *_ = shapes
    executed = arithmetic.tflop(step, *shapes)
    program = compile_program(step, *shapes)
    facts = {
      'sizes': f'{config.batch_size} clip, {config.data.frames} frames of '
      f'{config.data.size} x {config.data.size}',
      'dtype': config.dtype,
      'remat': config.remat,
      'parameters_millions': sum(x.size for x in abstract_state.params.values()) / 1e6,
      'tflop_with_recomputation': executed,
    } | program.facts()
    context.save(facts)
    tflop = tflop_without_recomputation(config, mesh)

    # 2. Check the first step
    state, *rest = random_arguments(fill_for(context), *shapes)

    def call():
      nonlocal state
      state, metrics = program.call(state, *rest)
      jax.block_until_ready((state, metrics))
      return metrics

    metrics = call()
    check_finite((metrics['loss'], metrics['grad_norm']), 'the loss or its gradient')

    # 3. Measure those that follow
    repeats = 5 if context.reduced else 10
    rates = floors.measured_rates(context.out)
    times = floors.compare_with_floors(tflop, laps(call, repeats), rates)

  outcome = {
    'repeats': repeats,
    'loss_first': metrics['loss'],
    'summary': floors.summary(times),
  }
  return facts | times | peak_gib() | outcome


def tflop_without_recomputation(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> float:
  """The arithmetic of a step that recomputes nothing; utilisation is of this."""
  config = config.copy_and_resolve_references()
  config.remat = 'none'
  step, shapes = diffusion_step(config, mesh)
  return arithmetic.tflop(step, *shapes)


def random_arguments(
  fill: Fill, state: Any, frozen: Any, batch: dict[str, Any], key: Any
) -> tuple[Any, ...]:
  """Arrays for the arguments of a step: random weights, and a random batch.

  Args:
    fill: makes parameters of given shapes.
    state, frozen, batch, key: shapes with shardings.

  Returns:
    The four as arrays on the device, placed as their shapes say.
  """
  # 1. State
  params = fill(state.params)

  def zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

  filled_state = TrainState(
    step=zeros(state.step),
    params=params,
    ema=jax.tree.map(jnp.copy, params) if state.ema else {},
    opt_state=zeros(state.opt_state),
    extra=zeros(state.extra),
  )

  # 2. Batch. All is between 0 and 1, as probabilities, masks and deviations may be.
  keys = jax.random.split(jax.random.key(1), len(batch))
  filled_batch = {
    name: jax.random.uniform(batch_key, x.shape).astype(x.dtype)
    for batch_key, (name, x) in zip(keys, batch.items(), strict=True)
  }

  # 3. Place everything
  arrays = (filled_state, fill(frozen), filled_batch, jax.random.key(2))
  shardings = jax.tree.map(lambda x: x.sharding, (state, frozen, batch, key))
  return jax.device_put(arrays, shardings)

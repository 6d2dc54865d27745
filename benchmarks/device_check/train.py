"""Part `train`: one step of diffusion training, as the loop makes it, on one device."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from benchmarks import arithmetic
from benchmarks.denoising_step import Fill
from benchmarks.device_check import floors
from benchmarks.device_check.measure import check_finite, compiled, peak_gib
from benchmarks.device_check.networks import fill_for
from benchmarks.device_check.parts import Context
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
  config.batch_size, config.accum, config.remat = 1, 1, 'block'
  return config


def run(context: Context) -> dict[str, Any]:
  """Loss, gradients, optimizer and moving average, with the state donated."""
  config = config_for(context.reduced)
  mesh = parallel.make_mesh(devices=jax.local_devices()[:1])
  with jax.set_mesh(mesh):
    step, shapes = diffusion_step(config, mesh)
    executed = arithmetic.tflop(step, *shapes)
    program = compiled(step, *shapes)
    facts = {
      'sizes': f'{config.batch_size} clip, {config.data.frames} frames of '
      f'{config.data.size} x {config.data.size}',
      'dtype': config.dtype,
      'remat': config.remat,
      'parameters_millions': sum(x.size for x in shapes[0].params.values()) / 1e6,
      'tflop_with_recomputation': executed,
    } | program.facts()
    context.save(facts)
    tflop = needed(config, mesh)

    held = list(values(fill_for(context), *shapes))

    def call():
      held[0], metrics = program.call(*held)
      jax.block_until_ready((held[0], metrics))
      return metrics

    metrics = call()
    check_finite((metrics['loss'], metrics['grad_norm']), 'the loss or its gradient')
    repeats = 5 if context.reduced else 10
    times = floors.against(tflop, laps(call, repeats), floors.here(context.out))
  return (
    facts
    | times
    | peak_gib()
    | {
      'repeats': repeats,
      'loss_first': metrics['loss'],
      'summary': floors.sentence(times),
    }
  )


def needed(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> float:
  """The arithmetic of a step that recomputes nothing; utilisation is of this."""
  config = config.copy_and_resolve_references()
  config.remat = 'none'
  step, shapes = diffusion_step(config, mesh)
  return arithmetic.tflop(step, *shapes)


def values(
  fill: Fill, state: TrainState, rest: Any, batch: dict[str, Any], key: Any
) -> tuple[Any, ...]:
  """Arrays of these shapes, made on the device: random weights, and a random batch."""
  params = fill(state.params)

  def zeros(tree):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

  full = TrainState(
    step=zeros(state.step),
    params=params,
    ema=jax.tree.map(jnp.copy, params) if state.ema else {},
    opt_state=zeros(state.opt_state),
    extra=zeros(state.extra),
  )
  # Between 0 and 1: a probability, a mask and a deviation are that too.
  keys = jax.random.split(jax.random.key(1), len(batch))
  filled = {
    name: jax.random.uniform(k, x.shape).astype(x.dtype)
    for k, (name, x) in zip(keys, batch.items(), strict=True)
  }
  held = fill(rest)
  shapes = (state, rest, batch, key)
  shards = jax.tree.map(lambda x: x.sharding, shapes)
  return jax.device_put((full, held, filled, jax.random.key(2)), shards)

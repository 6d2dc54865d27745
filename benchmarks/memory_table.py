"""Memory of the full-size diffusion training step per device, as its compiler counts
it. Nothing is allocated or run.

    python -m benchmarks.memory_table --devices 8 --mesh fsdp=8 --mesh fsdp=4,sequence=2      # simulated CPU devices
    python -m benchmarks.memory_table --tpu v5p:4x4x4 --mesh fsdp=64                          # the compiler for TPU

The step is that of `configs/diffusion.py` and the training loop: loss, optimizer,
averages, shardings, donation. Arguments are parameters, averages, moments and the
batch; temporaries are gathered parameters, gradients and activations. XLA for CPU keeps
more of these than XLA for accelerators: bfloat16 becomes float32 where the CPU has no
instruction for it, less is fused, and nothing is scheduled for memory. Its figures are
upper bounds. (At full size it had not finished after a quarter of an hour.) The
compiler for TPU needs libtpu, but no TPU (`pip install libtpu`; set
TPU_SKIP_MDS_QUERY=1 outside of Google's cloud); for meshes of devices that it knows,
its figures are those of a run, and what does not fit it refuses. At full size it takes
an hour, and 30 GB of memory or swap.
"""

import argparse
import functools
import time
from typing import Any

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_collections

from configs import diffusion
from dicetalk_jax import parallel
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.models.vae import VAEConfig
from dicetalk_jax.training import lora
from dicetalk_jax.training.diffusion import TRAINED, DiffusionTask
from dicetalk_jax.training.diffusion_loss import DiffusionLoss
from dicetalk_jax.training.optimizer import make_optimizer
from dicetalk_jax.training.state import init_state, partition
from dicetalk_jax.training.step import make_train_step
from dicetalk_jax.training.task import Task

GIB = 2**30
# Nothing is run, so machine code need not be fast, nor reductions joined, over which
# this compiler takes very long.
CPU_OPTIONS = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
  'xla_disable_hlo_passes': 'all-reduce-combiner,cpu-all-reduce-combiner',
}
MEMORY = {
  'TPU v5e': 16,
  'TPU v4': 32,
  'TPU v6e': 32,
  'H100': 80,
  'TPU v5p': 95,
  'H200': 141,
}  # GB, 1e9 bytes


def diffusion_task(
  config: ml_collections.ConfigDict,
) -> tuple[DiffusionTask, parameters.Abstract]:
  """The task without data and frozen networks, and all parameters it may train."""
  graphs = {}
  params = {}
  for name in TRAINED:
    if name in config:
      build = registry.builder(name, config[name].to_dict(), config.dtype)
      graphs[name], part = parameters.abstract(build)
      params |= parameters.add_prefix(name, part)
  task = DiffusionTask.__new__(DiffusionTask)
  task.config = config
  task.has_emotion = 'emo_model' in config
  task._loss = DiffusionLoss(config, graphs, VAEConfig().scaling_factor)
  return task, params


def batch_shapes(config: ml_collections.ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch of `dicetalk_jax.data.diffusion_loader`, `[batch_size, ...]`."""
  frames = config.data.frames
  size = config.data.size
  audio = config.audio_linear
  shapes = {
    'latents': (frames, size // 8, size // 8, 4),
    'reference': (size // 8, size // 8, 4),
    'image_token': (1, config.unet.cross_attention_dim),
    'audio': (frames, audio.seq_len, audio.blocks, audio.channels),
    'mask': (size, size),
    'emotion_class': (),
    'buckets': (2,),
    'drop': (),
  }
  if 'emo_model' in config:
    shapes['mu'] = shapes['sigma'] = (config.emo_model.prior_dim,)
  dtypes = {'emotion_class': jnp.int32}
  return {
    name: jax.ShapeDtypeStruct(
      (config.batch_size, *shape), dtypes.get(name, jnp.float32)
    )
    for name, shape in shapes.items()
  }


def abstract_step(
  task: Task,
  params: parameters.Abstract,
  batch: dict[str, jax.ShapeDtypeStruct],
  mesh: Any,
) -> tuple[Any, tuple[Any, ...]]:
  """The training step of a task as the loop makes it. Call it with the mesh set.

  Args:
    task: needs no data: only its configuration, its loss and what follows an update.
    params: shapes of what `task.init` would return.
    batch: shapes of a batch.
    mesh: concrete or abstract.

  Returns:
    `train_step`, and its arguments as shapes with shardings.
  """
  config = task.config
  parallel.check_batch(config.batch_size, mesh, config.accum)

  # Parameters, trained and held.
  def placed(tree):
    return parallel.with_shardings(tree, parallel.shardings(tree, mesh))

  trained, held = partition(
    placed(lora.extended(params, config)),
    lora.patterns(config),
    sets=task.sets,
    constants=task.constants,
  )

  # State and step.
  def loss(params, held, *args):
    return task.loss(lora.merged({**held, **params}, config), *args)

  tx = make_optimizer(config.optim, config.total_steps, task.new_modules)
  new_state = functools.partial(
    init_state, tx=tx, ema=bool(config.optim.ema), extra=task.extra_state
  )
  state = placed(jax.eval_shape(new_state, trained))
  step = make_train_step(
    loss,
    tx,
    parallel.shardings(state, mesh),
    accum=config.accum,
    ema=config.optim.ema,
    after_update=task.after_update,
  )

  # What changes from step to step.
  rows = parallel.batch_sharding(mesh)
  batch = parallel.with_shardings(batch, dict.fromkeys(batch, rows))
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = parallel.with_shardings(key, NamedSharding(mesh, P()))
  return step, (state, held, batch, key)


def diffusion_step(
  config: ml_collections.ConfigDict, mesh: Any
) -> tuple[Any, tuple[Any, ...]]:
  """`abstract_step` of the diffusion task."""
  task, params = diffusion_task(config)
  return abstract_step(task, params, batch_shapes(config), mesh)


def compiled_bytes(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[int, int]:
  """(arguments, temporaries) of the compiled step per device."""
  platform = mesh.devices.flat[0].platform
  with jax.set_mesh(mesh):  # layers choose their form by the devices of the mesh
    step, arguments = diffusion_step(config, mesh)
    stats = (
      step.lower(*arguments)
      .compile(CPU_OPTIONS if platform == 'cpu' else None)
      .memory_analysis()
    )
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  return stats.argument_size_in_bytes, stats.temp_size_in_bytes + outputs


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--devices', type=int, default=8, help='simulated CPU devices')
  parser.add_argument(
    '--tpu', default='', help='topology to compile for instead, such as v5p:2x2x2'
  )
  parser.add_argument(
    '--mesh', action='append', help='such as data=2,fsdp=4,sequence=1; several times'
  )
  parser.add_argument('--remat', default='block', help='several: block,none')
  parser.add_argument('--accum', default='1', help='micro-batches; several: 1,4')
  parser.add_argument(
    '--batch', type=int, default=0, help='default: that of the configuration'
  )
  args = parser.parse_args()

  if args.tpu:
    devices = topologies.get_topology_desc(
      platform='tpu', topology_name=args.tpu
    ).devices
  else:
    jax.config.update('jax_num_cpu_devices', args.devices)
    devices = jax.devices()
  print(f'{len(devices)} devices, {devices[0].device_kind}; GiB per device\n')
  print(
    '| mesh | rows | remat | accum | arguments | temporaries | total | fits | compiled '
    'in |\n' + '| --- ' * 9 + '|'
  )
  for sizes in args.mesh or ['fsdp=-1']:
    mesh = parallel.make_mesh(
      **{k: int(v) for k, v in (pair.split('=') for pair in sizes.split(','))},
      devices=devices,
    )
    for remat in args.remat.split(','):
      for accum in map(int, args.accum.split(',')):
        config = diffusion.get_config()
        config.remat, config.accum = remat, accum
        config.batch_size = args.batch or config.batch_size
        begun = time.monotonic()
        row = [sizes, config.batch_size, remat, accum]
        try:
          parts = compiled_bytes(config, mesh)
        except (
          jax.errors.JaxRuntimeError
        ) as error:  # the compiler for TPU refuses what does not fit
          print(
            '|',
            ' | '.join(map(str, row)),
            f'| {str(error).splitlines()[0][:200]} |',
            flush=True,
          )
          continue
        fits = (
          ', '.join(name for name, size in MEMORY.items() if sum(parts) <= 1e9 * size)
          or 'none'
        )
        row += [f'{size / GIB:.1f}' for size in (*parts, sum(parts))]
        print(
          '|',
          ' | '.join(map(str, row)),
          f'| {fits} | {(time.monotonic() - begun) / 60:.1f} min |',
          flush=True,
        )


if __name__ == '__main__':
  main()

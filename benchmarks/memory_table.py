"""Lists the memory of the full-size diffusion training step per device.

Nothing is allocated or run: the figures are those of the compiler. On simulated CPU
devices, and with the compilers for TPU and NVIDIA GPUs:

  python -m benchmarks.memory_table --devices 8 --mesh fsdp=8 --mesh fsdp=4,sequence=2
  python -m benchmarks.memory_table --tpu v5p:4x4x4 --mesh fsdp=64
  python -m benchmarks.memory_table --gpu h200 --devices 8 --batch 8 --out FILE.json

The step is that of `configs/diffusion.py` and the training loop: loss, optimizer, EMA,
shardings, donation. Arguments are parameters, EMA, moments and the batch; temporaries
are gathered parameters, gradients and activations. `--out` also writes what the devices
exchange.

XLA for CPU keeps more of these than XLA for accelerators: bfloat16 becomes float32
where the CPU has no instruction for it, less is fused, and nothing is scheduled for
memory. Its figures are upper bounds. (At full size it had not finished after a quarter
of an hour.)

The compiler for TPU needs libtpu, but no TPU (`pip install libtpu`; set
TPU_SKIP_MDS_QUERY=1 outside of Google's cloud). For meshes of devices that it knows,
its figures are those of a run, and it refuses what does not fit. At full size it takes
an hour, and 30 GB of memory or swap.

The compiler for GPUs needs no GPU either: `make compiler-gpu`, then
.compiler-gpu/bin/python.
"""

import argparse
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_collections

from benchmarks import collectives
from benchmarks.compiled import devices
from benchmarks.timing import timed
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
# Nothing is run, so the code need not be fast. Joining reductions takes this compiler
# very long.
CPU_OPTIONS = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
  'xla_disable_hlo_passes': 'all-reduce-combiner,cpu-all-reduce-combiner',
}
# Of one device, in GB (1e9 bytes).
MEMORY = {
  'TPU v5e': 16,
  'TPU v4': 32,
  'TPU v6e': 32,
  'H100': 80,
  'TPU v5p': 95,
  'H200': 141,
}


COLUMNS = (
  'mesh',
  'rows',
  'remat',
  'accum',
  'arguments',
  'temporaries',
  'total',
  'fits',
  'compiled in',
)


def diffusion_task(
  config: ml_collections.ConfigDict,
) -> tuple[DiffusionTask, parameters.Abstract]:
  """The task without data and frozen networks, and all parameters it may train."""
  graphs = {}
  params: parameters.Abstract = {}
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
    shapes['mu'] = (config.emo_model.prior_dim,)
    shapes['sigma'] = (config.emo_model.prior_dim,)
  dtypes = dict.fromkeys(shapes, jnp.float32) | {'emotion_class': jnp.int32}
  return {
    name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtypes[name])
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

  def placed(tree):
    return parallel.with_shardings(tree, parallel.shardings(tree, mesh))

  # 1. Trained and frozen parameters
  trained, frozen = partition(
    placed(lora.extended(params, config)),
    lora.patterns(config),
    sets=task.sets,
    constants=task.constants,
  )

  # 2. State and step
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

  # 3. Batch and key, new in every step
  rows = parallel.batch_sharding(mesh)
  batch = parallel.with_shardings(batch, dict.fromkeys(batch, rows))
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = parallel.with_shardings(key, NamedSharding(mesh, P()))
  return step, (state, frozen, batch, key)


def diffusion_step(
  config: ml_collections.ConfigDict, mesh: Any
) -> tuple[Any, tuple[Any, ...]]:
  """`abstract_step` of the diffusion task."""
  task, params = diffusion_task(config)
  return abstract_step(task, params, batch_shapes(config), mesh)


class Memory(NamedTuple):
  """Bytes per device of a compiled step, and what the devices exchange."""

  arguments: int
  temporaries: int
  exchanged: dict[str, dict[str, float]]

  @property
  def total(self) -> int:
    return self.arguments + self.temporaries


def compiled_memory(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Memory:
  """Compiles the step for the devices of the mesh."""
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  with jax.set_mesh(mesh):  # layers choose their form by the devices of the mesh
    step, arguments = diffusion_step(config, mesh)
    lowered = step.lower(*arguments)
    compiled = lowered.compile(CPU_OPTIONS if on_cpu else None)
  stats = compiled.memory_analysis()
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  return Memory(
    stats.argument_size_in_bytes,
    stats.temp_size_in_bytes + outputs,
    collectives.summary(compiled.as_text()),
  )


def line(*cells: object) -> str:
  """One line of a Markdown table."""
  return '| ' + ' | '.join(map(str, cells)) + ' |'


def table_line(
  mesh_name: str,
  mesh: jax.sharding.Mesh,
  config: ml_collections.ConfigDict,
  records: list[dict[str, Any]],
) -> str:
  """Compiles one variant and describes it; adds its record."""
  variant = (mesh_name, config.batch_size, config.remat, config.accum)
  try:
    memory, seconds = timed(lambda: compiled_memory(config, mesh))
  except jax.errors.JaxRuntimeError as error:
    # The compiler for TPU refuses what does not fit.
    reason = str(error).splitlines()[0][:200]
    return line(*variant, reason)
  records.append(
    {
      'devices': f'{mesh.size} {mesh.devices.flat[0].device_kind}',
      **dict(zip(COLUMNS, variant)),
      'arguments_gb': round(memory.arguments / 1e9, 2),
      'temporaries_gb': round(memory.temporaries / 1e9, 2),
      'collectives': memory.exchanged,
    }
  )
  fits = [name for name, size in MEMORY.items() if memory.total <= 1e9 * size]
  sizes = (memory.arguments, memory.temporaries, memory.total)
  return line(
    *variant,
    *(f'{size / GIB:.1f}' for size in sizes),
    ', '.join(fits) or 'none',
    f'{seconds / 60:.1f} min',
  )


def parse_mesh(text: str, devices: Any) -> jax.sharding.Mesh:
  """Reads `--mesh`, such as 'data=2,fsdp=4'."""
  sizes = {}
  for pair in text.split(','):
    axis, size = pair.split('=')
    sizes[axis] = int(size)
  return parallel.make_mesh(**sizes, devices=devices)


def gpus(name: str, count: int) -> list[jax.Device]:
  """NVIDIA GPUs of one machine to compile for, which need not be there."""
  device = devices.known()[name]
  devices.configure(device)
  jax.config.update('jax_platforms', 'cpu')  # JAX has read its environment before
  return devices.topology(device, count)


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.memory_table', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--devices',
    type=int,
    default=8,
    help='GPUs, or simulated CPU devices (default: %(default)s)',
  )
  parser.add_argument(
    '--gpu', default='', help='GPU to compile for instead, such as h200'
  )
  parser.add_argument(
    '--tpu', default='', help='topology to compile for instead, such as v5p:2x2x2'
  )
  parser.add_argument(
    '--mesh',
    action='append',
    help='such as data=2,fsdp=4,sequence=1; may be repeated (default: fsdp=-1)',
  )
  parser.add_argument(
    '--remat',
    default='block',
    help='one or several, such as block,none (default: %(default)s)',
  )
  parser.add_argument(
    '--accum',
    default='1',
    help='micro-batches, one or several numbers, such as 1,4 (default: %(default)s)',
  )
  parser.add_argument(
    '--batch',
    type=int,
    default=0,
    help='clips per step (default: that of the configuration)',
  )
  parser.add_argument(
    '--out', type=pathlib.Path, help='write all figures as JSON, collectives too'
  )
  args = parser.parse_args()

  mesh_devices: list[jax.Device]
  if args.tpu:
    topology = topologies.get_topology_desc(platform='tpu', topology_name=args.tpu)
    mesh_devices = list(topology.devices)
  elif args.gpu:
    mesh_devices = gpus(args.gpu, args.devices)
  else:
    jax.config.update('jax_num_cpu_devices', args.devices)
    mesh_devices = jax.devices()

  print(f'{len(mesh_devices)} devices, {mesh_devices[0].device_kind}; GiB per device\n')
  print(line(*COLUMNS))
  print('| --- ' * len(COLUMNS) + '|')
  records: list[dict[str, Any]] = []
  for mesh_name in args.mesh or ['fsdp=-1']:
    mesh = parse_mesh(mesh_name, mesh_devices)
    for remat in args.remat.split(','):
      for accum in args.accum.split(','):
        config = diffusion.get_config()
        config.remat = remat
        config.accum = int(accum)
        config.batch_size = args.batch or config.batch_size
        print(table_line(mesh_name, mesh, config, records), flush=True)
  if args.out:
    args.out.write_text(json.dumps(records, indent=2) + '\n')


if __name__ == '__main__':
  main()

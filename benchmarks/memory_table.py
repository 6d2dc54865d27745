"""Memory of the full-size diffusion training step per device, as its compiler counts it. Nothing is allocated or run.

    python -m benchmarks.memory_table --devices 8 --mesh fsdp=8 --mesh fsdp=4,sequence=2      # simulated CPU devices
    python -m benchmarks.memory_table --tpu v5p:4x4x4 --mesh fsdp=64                          # the compiler for TPU

The step is that of `configs/diffusion.py` and the training loop: loss, optimizer, averages, shardings, donation.
Arguments are parameters, averages, moments and the batch; temporaries are gathered parameters, gradients and
activations. XLA for CPU keeps more of these than XLA for accelerators: bfloat16 becomes float32 where the CPU has no
instruction for it, less is fused, and nothing is scheduled for memory. Its figures are upper bounds. (At full size it
had not finished after a quarter of an hour.) The compiler for TPU needs libtpu, but no TPU (`pip install libtpu`; set
TPU_SKIP_MDS_QUERY=1 outside of Google's cloud); for meshes of devices that it knows, its figures are those of a run,
and what does not fit it refuses. At full size it takes an hour, and 30 GB of memory or swap.
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
from dicetalk_jax.models import core, registry
from dicetalk_jax.models.vae import VAEConfig
from dicetalk_jax.training.diffusion import TRAINED, DiffusionTask
from dicetalk_jax.training.diffusion_loss import DiffusionLoss
from dicetalk_jax.training.optimizer import make_optimizer
from dicetalk_jax.training.state import init_state, partition
from dicetalk_jax.training.step import make_train_step

GIB = 2 ** 30
# Nothing is run, so machine code need not be fast, nor reductions joined, over which this compiler takes very long.
CPU_OPTIONS = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True,
               'xla_disable_hlo_passes': 'all-reduce-combiner,cpu-all-reduce-combiner'}
MEMORY = {'TPU v5e': 16, 'TPU v4': 32, 'TPU v6e': 32, 'H100': 80, 'TPU v5p': 95, 'H200': 141}  # GB, 1e9 bytes


def abstract_loss(config: ml_collections.ConfigDict) -> tuple[DiffusionLoss, core.Abstract]:
  """The loss of the task, without its data and frozen networks, and the parameters of all that it trains."""
  abstract = {name: core.abstract(registry.builder(name, config[name].to_dict(), config.dtype)) for name in TRAINED}
  loss = DiffusionLoss(config, {name: graph for name, (graph, _) in abstract.items()}, VAEConfig().scaling_factor)
  return loss, {k: x for name, (_, part) in abstract.items() for k, x in core.prefixed(name, part).items()}


def batch_shapes(config: ml_collections.ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch of `data_pipelines.loader.diffusion_loader`, `[batch_size, ...]`."""
  b, frames, size, latent = config.batch_size, config.data.frames, config.data.size, config.data.size // 8
  audio = config.audio_linear
  shapes = dict(
      latents=(frames, latent, latent, 4), reference=(latent, latent, 4),
      image_token=(1, config.unet.cross_attention_dim),
      audio=(frames, audio.seq_len, audio.blocks, audio.channels), mu=(config.emo_model.prior_dim,),
      sigma=(config.emo_model.prior_dim,), mask=(size, size), emotion_class=(), buckets=(2,), drop=())
  return {name: jax.ShapeDtypeStruct((b, *shape), jnp.int32 if name == 'emotion_class' else jnp.float32)
          for name, shape in shapes.items()}


def abstract_step(config: ml_collections.ConfigDict, mesh: Any) -> tuple[Any, tuple[Any, ...]]:
  """(train_step, arguments) as the loop makes them; the arguments are shapes with shardings. Call with the mesh set."""
  parallel.check_batch(config.batch_size, mesh, config.accum)
  loss, params = abstract_loss(config)
  place = lambda tree: parallel.with_shardings(tree, parallel.shardings(tree, mesh))
  params, held = map(place, partition(params, config.trainable, sets=DiffusionTask.sets))
  tx = make_optimizer(config.optim, config.total_steps)
  target = jax.eval_shape(functools.partial(init_state, tx=tx, ema=bool(config.optim.ema)), params)
  shards = parallel.shardings(target, mesh)
  step = make_train_step(lambda params, held, *args: loss({**held, **params}, *args), tx, shards,
                         accum=config.accum, ema=config.optim.ema)
  batch = batch_shapes(config)
  batch = parallel.with_shardings(batch, dict.fromkeys(batch, parallel.batch_sharding(mesh)))
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, P()))
  return step, (parallel.with_shardings(target, shards), held, batch, key)


def compiled_bytes(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """(arguments, temporaries) of the compiled step per device."""
  platform = mesh.devices.flat[0].platform
  with jax.set_mesh(mesh):  # layers choose their form by the devices of the mesh
    step, arguments = abstract_step(config, mesh)
    stats = step.lower(*arguments).compile(CPU_OPTIONS if platform == 'cpu' else None).memory_analysis()
  outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  return stats.argument_size_in_bytes, stats.temp_size_in_bytes + outputs


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--devices', type=int, default=8, help='simulated CPU devices')
  parser.add_argument('--tpu', default='', help='topology to compile for instead, such as v5p:2x2x2')
  parser.add_argument('--mesh', action='append', help='such as data=2,fsdp=4,sequence=1; several times')
  parser.add_argument('--remat', default='block', help='several: block,none')
  parser.add_argument('--accum', default='1', help='micro-batches; several: 1,4')
  parser.add_argument('--batch', type=int, default=0, help='default: that of the configuration')
  args = parser.parse_args()

  if args.tpu:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=args.tpu).devices
  else:
    jax.config.update('jax_num_cpu_devices', args.devices)
    devices = jax.devices()
  print(f'{len(devices)} devices, {devices[0].device_kind}; GiB per device\n')
  print('| mesh | rows | remat | accum | arguments | temporaries | total | fits | compiled in |\n' + '| --- ' * 9 + '|')
  for sizes in args.mesh or ['fsdp=-1']:
    mesh = parallel.make_mesh(**{k: int(v) for k, v in (pair.split('=') for pair in sizes.split(','))}, devices=devices)
    for remat in args.remat.split(','):
      for accum in map(int, args.accum.split(',')):
        config = diffusion.get_config()
        config.remat, config.accum = remat, accum
        config.batch_size = args.batch or config.batch_size
        begun = time.monotonic()
        row = [sizes, config.batch_size, remat, accum]
        try:
          parts = compiled_bytes(config, mesh)
        except jax.errors.JaxRuntimeError as error:  # the compiler for TPU refuses what does not fit
          print('|', ' | '.join(map(str, row)), f'| {str(error).splitlines()[0][:200]} |', flush=True)
          continue
        fits = ', '.join(name for name, size in MEMORY.items() if sum(parts) <= 1e9 * size) or 'none'
        row += [f'{size / GIB:.1f}' for size in (*parts, sum(parts))]
        print('|', ' | '.join(map(str, row)), f'| {fits} | {(time.monotonic() - begun) / 60:.1f} min |', flush=True)


if __name__ == '__main__':
  main()

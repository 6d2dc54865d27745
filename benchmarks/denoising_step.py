"""One full-size denoising step on the device at hand: `python -m benchmarks.denoising_step`.

Three guidance rows of 25 frames at 64x64 latents with 32 audio and 32 emotion tokens (a 512 px window as published),
bfloat16, random weights made on the device. The floor is arithmetic: 95.7 TFLOP once the keys and values of the
conditions are projected once per clip. `--frames 2 --latent 8 --tiny` tries the script itself on a laptop.
"""

import argparse
import functools
import statistics

import jax
import jax.numpy as jnp

from benchmarks.timing import seconds
from dicetalk_jax.models import core
from dicetalk_jax.models.unet import UNet, UNetConfig

STEP_TFLOP = 95.7  # 3 rows x 25 frames at 64x64
TINY = UNetConfig(block_out_channels=(32, 64, 64, 64), num_attention_heads=(2, 2, 2, 2), cross_attention_dim=64,
                  addition_time_embed_dim=16, projection_class_embeddings_input_dim=48)


def device_params(target: core.Abstract, dtype) -> core.Params:
  """Random values, one small program per distinct shape: a single one for all would compile for minutes."""
  @functools.partial(jax.jit, static_argnums=1)
  def draw(key, shape):
    scale = shape[-2] ** -0.5 if len(shape) > 1 else 0.1
    return scale * jax.random.normal(key, shape, dtype)
  key = jax.random.key(0)
  return {name: draw(jax.random.fold_in(key, i), x.shape) for i, (name, x) in enumerate(target.items())}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rows', type=int, default=3)
  parser.add_argument('--frames', type=int, default=25)
  parser.add_argument('--latent', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=10)
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--tiny', action='store_true', help='small channels, to try the script')
  args = parser.parse_args()

  device, dtype = jax.devices()[0], jnp.dtype(args.dtype)
  config = TINY if args.tiny else UNetConfig()
  graphdef, target = core.abstract(functools.partial(UNet, config, dtype=dtype))
  params = device_params(target, dtype)
  jax.block_until_ready(params)
  print(f'{device.device_kind}: {sum(x.size for x in params.values()) / 1e6:.1f} M parameters in {dtype.name}')

  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, dtype)
  rows, frames, side, dim = args.rows, args.frames, args.latent, config.cross_attention_dim
  tokens = draw(1, rows, 1, 1, dim), draw(2, rows, frames, 32, dim), draw(3, rows, 1, 32, dim)
  kv = jax.jit(lambda p, *c: core.merge(graphdef, p).context_kv(*c))(params, *tokens)
  masks = tuple(jnp.ones((rows, (side >> level) ** 2), dtype) for level in range(config.levels))
  inputs = (draw(4, rows, frames, side, side, 8), jnp.float32(0.5), kv, jnp.ones((rows, 3)),
            draw(5, rows, 1, side, side, config.block_out_channels[0]), masks)

  step = jax.jit(lambda p, *x: core.merge(graphdef, p)(*x)[0])
  compiled = []
  print(f'compiled in {seconds(lambda: compiled.append(step.lower(params, *inputs).compile())):.1f} s')
  call = lambda: compiled[0](params, *inputs).block_until_ready()
  call()
  times = [seconds(call) for _ in range(args.repeats)]
  median = statistics.median(times)
  print(f'one step: median {median:.4f} s, fastest {min(times):.4f} s of {args.repeats}')
  if not args.tiny and (rows, frames, side) == (3, 25, 64):
    print(f'{STEP_TFLOP / median:.0f} TFLOP/s achieved on {STEP_TFLOP} TFLOP')
  stats = device.memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    print(f'peak memory {stats["peak_bytes_in_use"] / 2**30:.1f} GiB')


if __name__ == '__main__':
  main()

"""Times one full-size denoising step.

  python -m benchmarks.denoising_step
  python -m benchmarks.denoising_step --frames 2 --latent 8 --tiny   # on a laptop

Three guidance rows of 25 frames at 64x64 latents with 32 audio and 32 emotion tokens (a
512 px window as published), bfloat16, random weights made on the device. The floor is
arithmetic: 95.7 TFLOP once the keys and values of the conditions are projected once per
clip. `benchmarks.device_check` runs the same step among other checks.
"""

import argparse
from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from benchmarks.timing import laps, timed
from dicetalk_jax.models import parameters
from dicetalk_jax.models.unet import UNet, UNetConfig

STEP_TFLOP = 95.7  # 3 rows x 25 frames at 64x64
PUBLISHED_TFLOP = 104.9  # with temporal keys and values projected for every pixel
TOKENS = 32  # of audio per frame, and of emotion
TINY = UNetConfig(
  block_out_channels=(32, 64, 64, 64),
  num_attention_heads=(2, 2, 2, 2),
  cross_attention_dim=64,
  addition_time_embed_dim=16,
  projection_class_embeddings_input_dim=48,
)

Fill = Callable[[parameters.Abstract], parameters.Params]


class Sizes(NamedTuple):
  """Sizes of one step: guidance rows, frames, and the side of the latents."""

  config: UNetConfig
  rows: int
  frames: int
  side: int
  dtype: Any


FULL = Sizes(UNetConfig(), rows=3, frames=25, side=64, dtype=jnp.bfloat16)


class Inputs(NamedTuple):
  """Arguments of the UNet, in its order.

  Attributes:
    sample: noisy latents `[rows, frames, side, side, channels]`.
    timestep: a scalar.
    kv: keys and values of the conditions, by the name of their attention layer.
    time_ids: `[rows, 3]`.
    spatial: output of the pose guide `[rows, 1, side, side, channels]`.
    masks: of the face, per level `[rows, tokens]`.
  """

  sample: jax.Array
  timestep: jax.Array
  kv: Any
  time_ids: jax.Array
  spatial: jax.Array
  masks: tuple[jax.Array, ...]


class Step(NamedTuple):
  """One denoising step.

  Attributes:
    call: `call(params, *inputs)` is the prediction; jitted.
    params: of the UNet.
    inputs: of the UNet.
    image: the CLIP tokens that `inputs.kv` was made from, among others.
  """

  call: jax.stages.Wrapped
  params: parameters.Params
  inputs: Inputs
  image: jax.Array


def as_dtype(target: parameters.Abstract, dtype: Any) -> parameters.Abstract:
  """The same parameters, all in one type."""
  return {name: jax.ShapeDtypeStruct(x.shape, dtype) for name, x in target.items()}


def device_params(target: parameters.Abstract) -> parameters.Params:
  """Random values, made on the device.

  One small program per distinct shape: a single one for all would compile for minutes.
  For small models `parameters.numpy_params`, which compiles nothing, is faster.
  """

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def draw(key, shape, dtype, mean):
    scale = math.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.1
    return scale * jax.random.normal(key, shape, dtype) + mean.astype(dtype)

  key = jax.random.key(0)
  params = {}
  for i, (name, x) in enumerate(target.items()):
    mean = jnp.float32(name.endswith('scale'))
    params[name] = draw(jax.random.fold_in(key, i), x.shape, jnp.dtype(x.dtype), mean)
  return params


def make_step(sizes: Sizes, fill: Fill = device_params) -> Step:
  """Parameters and inputs on the device, and the step, which is not yet compiled."""
  build = functools.partial(UNet, sizes.config, dtype=sizes.dtype)
  graphdef, target = parameters.abstract(build)
  params = fill(as_dtype(target, sizes.dtype))
  inputs, image = make_inputs(graphdef, params, sizes)

  @jax.jit
  def call(params, *inputs):
    prediction, *_ = parameters.merge(graphdef, params)(*inputs)
    return prediction

  return Step(call, params, inputs, image)


def make_inputs(
  graphdef: nnx.GraphDef, params: parameters.Params, sizes: Sizes
) -> tuple[Inputs, jax.Array]:
  """Random inputs of the UNet, and the image tokens that some of them are made of."""
  config = sizes.config
  rows = sizes.rows
  frames = sizes.frames
  side = sizes.side

  def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, sizes.dtype)

  # Keys and values of the conditions: once per clip, not part of the step.
  @jax.jit
  def project(params, *tokens):
    return parameters.merge(graphdef, params).context_kv(*tokens)

  image = draw(1, rows, 1, 1, config.cross_attention_dim)
  audio = draw(2, rows, frames, TOKENS, config.cross_attention_dim)
  emotion = draw(3, rows, 1, TOKENS, config.cross_attention_dim)

  tokens = [(side >> level) ** 2 for level in range(config.levels)]
  inputs = Inputs(
    sample=draw(4, rows, frames, side, side, config.in_channels),
    timestep=jnp.float32(0.5),
    kv=project(params, image, audio, emotion),
    time_ids=jnp.ones((rows, 3)),
    spatial=draw(5, rows, 1, side, side, config.block_out_channels[0]),
    masks=tuple(jnp.ones((rows, count), sizes.dtype) for count in tokens),
  )
  return inputs, image


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.denoising_step', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--rows', type=int, default=FULL.rows, help='guidance rows (default: %(default)s)'
  )
  parser.add_argument(
    '--frames',
    type=int,
    default=FULL.frames,
    help='frames per row (default: %(default)s)',
  )
  parser.add_argument(
    '--latent',
    type=int,
    default=FULL.side,
    help='side of the latents (default: %(default)s)',
  )
  parser.add_argument(
    '--repeats', type=int, default=10, help='timed calls (default: %(default)s)'
  )
  parser.add_argument(
    '--dtype', default='bfloat16', help='compute type (default: %(default)s)'
  )
  parser.add_argument(
    '--tiny', action='store_true', help='small channels, to try the script'
  )
  args = parser.parse_args()

  # 1. Make parameters and inputs
  device = jax.devices()[0]
  dtype = jnp.dtype(args.dtype)
  config = TINY if args.tiny else FULL.config
  sizes = Sizes(config, args.rows, args.frames, args.latent, dtype)
  step = make_step(sizes)
  count = sum(x.size for x in step.params.values())
  print(f'{device.device_kind}: {count / 1e6:.1f} M parameters in {dtype.name}')

  # 2. Compile
  lowered = step.call.lower(step.params, *step.inputs)
  compiled, compile_seconds = timed(lowered.compile)
  print(f'compiled in {compile_seconds:.1f} s')

  # 3. Measure
  def call():
    compiled(step.params, *step.inputs).block_until_ready()

  call()
  times = laps(call, args.repeats)
  print(
    f'one step: median {times.median:.4f} s, '
    f'fastest {times.fastest:.4f} s of {args.repeats}'
  )
  if sizes._replace(dtype=FULL.dtype) == FULL:
    print(f'{STEP_TFLOP / times.median:.0f} TFLOP/s achieved on {STEP_TFLOP} TFLOP')
  stats = device.memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    print(f'peak memory {stats["peak_bytes_in_use"] / 2**30:.1f} GiB')


if __name__ == '__main__':
  main()

"""Compares the speed of a small UNet with PyTorch eager on the same cores.

  python -m benchmarks.side_by_side

The same random weights in both (converted by the naming rule), the same inputs,
float32; the PyTorch side is the diffusers class without adapters. PyTorch runs threads
on all cores. JAX has a device for each core (`examples.cores`) and splits the rows to
sample; it trains on one, as so few rows do not pay for the exchange of gradients.
Prints the ratio of median times, PyTorch over JAX, and how far the outputs agree. Needs
the test extra.
"""

import argparse
from collections.abc import Callable
import functools
import json
import pathlib
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax
import torch

from benchmarks.timing import alternate, timed
from convert.naming import to_torch
from dicetalk_jax import parallel
from dicetalk_jax.diffusion import edm, schedule
from dicetalk_jax.models import parameters
from dicetalk_jax.models.unet import UNet, UNetConfig
from examples.cores import share_cores

# Rows, frames and latents of the preset `tiny`.
ROWS = 8
FRAMES = 4
SIDE = 8
TIMESTEP = 0.5
LEARNING_RATE = 1e-4
STEPS = 12  # of sampling, as in the preset `tiny`

# Arguments that our UNet and that of diffusers share.
SIZES: dict[str, Any] = dict(
  in_channels=8,
  out_channels=4,
  block_out_channels=(32, 64, 64, 64),
  layers_per_block=1,
  num_attention_heads=(2, 2, 2, 2),
  cross_attention_dim=32,
  addition_time_embed_dim=16,
  projection_class_embeddings_input_dim=48,
)


class Inputs(NamedTuple):
  """Random inputs of both.

  Attributes:
    sample: noisy latents `[rows, frames, side, side, channels]`.
    image: CLIP token `[rows, 1, D]`.
    time_ids: `[rows, 3]`.
  """

  sample: np.ndarray
  image: np.ndarray
  time_ids: np.ndarray

  @classmethod
  def draw(cls) -> 'Inputs':
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
      return rng.normal(size=shape).astype(np.float32)

    return cls(
      sample=normal(ROWS, FRAMES, SIDE, SIDE, SIZES['in_channels']),
      image=normal(ROWS, 1, SIZES['cross_attention_dim']),
      time_ids=normal(ROWS, 3),
    )


def ours(
  inputs: Inputs, mesh: Mesh
) -> tuple[Callable[..., jax.Array], parameters.Params, jax.Array]:
  """Our UNet, with its rows spread over the mesh.

  Returns:
    `forward(params, sample, timestep)`, random parameters, and the sample.
  """
  config = UNetConfig(**SIZES, adapters=0)
  graphdef, target = parameters.abstract(functools.partial(UNet, config))
  sample, image, time_ids = jax.device_put(inputs, parallel.batch_sharding(mesh))

  def forward(params, sample, timestep):
    unet = parameters.merge(graphdef, params)
    kv = unet.context_kv(image[:, None])
    prediction, *_ = unet(sample, timestep, kv, time_ids)
    return prediction

  everywhere = NamedSharding(mesh, PartitionSpec())
  params = jax.device_put(parameters.numpy_params(target), everywhere)
  return forward, params, sample


def theirs(inputs: Inputs, params: parameters.Params) -> tuple[Any, tuple[Any, ...]]:
  """The UNet of diffusers with our parameters, and its inputs."""
  unet: Any = diffusers.UNetSpatioTemporalConditionModel(**SIZES, num_frames=FRAMES)
  arrays = {name: np.asarray(value) for name, value in params.items()}
  weights = {key: torch.tensor(value) for key, value in to_torch(arrays).items()}
  unet.load_state_dict(weights)
  channels_first = np.moveaxis(inputs.sample, -1, 2).copy()
  return unet, (
    torch.tensor(channels_first),
    torch.tensor(TIMESTEP),
    torch.tensor(inputs.image),
    torch.tensor(inputs.time_ids),
  )


class Pair(NamedTuple):
  """The same network twice.

  Attributes:
    forward: ours, `forward(params, sample, timestep)`.
    params: of ours.
    sample: of ours, spread over the devices.
    unet: that of PyTorch.
    unet_inputs: its arguments.
    repeats: timed calls of each.
  """

  forward: Callable[..., jax.Array]
  params: parameters.Params
  sample: jax.Array
  unet: Any
  unet_inputs: tuple[Any, ...]
  repeats: int


def make_pair(mesh: Mesh, repeats: int) -> Pair:
  """Both networks, ours spread over the mesh."""
  inputs = Inputs.draw()
  forward, params, sample = ours(inputs, mesh)
  unet, unet_inputs = theirs(inputs, params)
  return Pair(forward, params, sample, unet, unet_inputs, repeats)


def compare_forward(pair: Pair) -> dict[str, float]:
  """Times one evaluation of each."""
  jitted = jax.jit(pair.forward)

  def jax_forward():
    return jitted(pair.params, pair.sample, TIMESTEP).block_until_ready()

  def torch_forward():
    with torch.no_grad():
      return pair.unet(*pair.unet_inputs).sample

  return compare('forward', pair.repeats, jax_forward, torch_forward)


def compare_sampling(pair: Pair) -> dict[str, float]:
  """Times all Euler steps of a short sampler: a compiled loop, and one in Python."""
  sigmas = schedule.karras_sigmas(STEPS, sigma_max=5.0)
  timesteps = schedule.timesteps(sigmas)

  @jax.jit
  def sample(params, start):
    reference = start[..., 4:]

    def step(i, z):
      sigma, sigma_next = jnp.asarray(sigmas)[i], jnp.asarray(sigmas)[i + 1]
      scaled = jnp.concatenate([z * edm.c_in(sigma), reference], axis=-1)
      v = pair.forward(params, scaled, jnp.asarray(timesteps)[i])
      return schedule.euler_step(z, v, sigma, sigma_next)

    return jax.lax.fori_loop(0, STEPS, step, start[..., :4])

  def jax_sample():
    return sample(pair.params, pair.sample).block_until_ready()

  def torch_sample():
    start, _, image, time_ids = pair.unet_inputs
    z, reference = start[:, :, :4], start[:, :, 4:]
    with torch.no_grad():
      for i, sigma in enumerate(map(float, sigmas[:-1])):
        scale = (1 + sigma**2) ** -0.5
        scaled = torch.cat([z * scale, reference], dim=2)
        v = pair.unet(scaled, torch.tensor(timesteps[i]), image, time_ids).sample
        denoised = z * scale**2 - v * sigma * scale
        z = z + (z - denoised) / sigma * (float(sigmas[i + 1]) - sigma)
    return z

  repeats = max(3, pair.repeats // 5)
  return compare(f'{STEPS} Euler steps', repeats, jax_sample, torch_sample)


def compare_training(pair: Pair) -> dict[str, float]:
  """Times forward pass, backward pass and Adam of each."""
  tx = optax.adam(LEARNING_RATE)

  def loss(params):
    return jnp.mean(jnp.square(pair.forward(params, pair.sample, TIMESTEP)))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params, moments):
    updates, moments = tx.update(jax.grad(loss)(params), moments)
    return optax.apply_updates(params, updates), moments

  state = (jax.tree.map(jnp.copy, pair.params), tx.init(pair.params))

  def jax_step():
    nonlocal state
    state = jax.block_until_ready(train_step(*state))

  adam = torch.optim.Adam(pair.unet.parameters(), LEARNING_RATE)

  def torch_step():
    adam.zero_grad()
    pair.unet(*pair.unet_inputs).sample.square().mean().backward()
    adam.step()

  return compare('training step', pair.repeats, jax_step, torch_step)


def compare(
  name: str,
  repeats: int,
  ours: Callable[[], Any],
  theirs: Callable[[], Any],
) -> dict[str, float]:
  """Warms both up, compares what they return, and times them in turn."""
  result, compile_seconds = timed(ours)
  expected = theirs()
  facts = {'compile_seconds': compile_seconds}
  if expected is not None:
    actual = np.moveaxis(np.asarray(result), -1, 2)
    facts['largest_difference'] = float(np.abs(actual - expected.numpy()).max())
  jax_seconds, torch_seconds = alternate(ours, theirs, repeats)
  facts |= {
    'jax_ms': 1e3 * jax_seconds,
    'torch_ms': 1e3 * torch_seconds,
    'ratio': torch_seconds / jax_seconds,
  }
  print(f'{name:15}', *(f'{key} {value:.4g}  ' for key, value in facts.items()))
  return facts


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.side_by_side', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--repeats', type=int, default=15, help='timed calls of each (default: %(default)s)'
  )
  parser.add_argument(
    '--out', type=pathlib.Path, metavar='FILE', help='write the figures as JSON'
  )
  args = parser.parse_args()

  share_cores()
  print(f'PyTorch on {torch.get_num_threads()} threads')
  results = {}
  for name, count, measure in (
    ('forward', len(jax.devices()), compare_forward),
    ('sampling', len(jax.devices()), compare_sampling),
    ('training', 1, compare_training),
  ):
    mesh = parallel.make_mesh(data=-1, fsdp=1, devices=jax.devices()[:count])
    with jax.set_mesh(mesh):
      results[name] = {'devices': count} | measure(make_pair(mesh, args.repeats))
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
  main()

"""Compares the speed of a small UNet with PyTorch eager on the same cores.

  python -m benchmarks.side_by_side

The same random weights in both (converted by the naming rule), the same inputs,
float32; the PyTorch side is the diffusers class without adapters. Prints the ratio of
median times, PyTorch over JAX, and how far the outputs agree. Needs the test extra.
"""

import argparse
from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks.timing import alternate, seconds
from convert.naming import to_torch
from dicetalk_jax.models import parameters
from dicetalk_jax.models.unet import UNet, UNetConfig

ROWS = 2
FRAMES = 8
SIDE = 16
TIMESTEP = 0.5
LEARNING_RATE = 1e-4

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


def ours(inputs: Inputs) -> tuple[Callable[..., jax.Array], parameters.Params]:
  """Our UNet as a function of its parameters, and random parameters."""
  config = UNetConfig(**SIZES, adapters=0)
  graphdef, target = parameters.abstract(functools.partial(UNet, config))
  sample, image, time_ids = map(jnp.asarray, inputs)

  def forward(params):
    unet = parameters.merge(graphdef, params)
    kv = unet.context_kv(image[:, None])
    prediction, *_ = unet(sample, jnp.float32(TIMESTEP), kv, time_ids)
    return prediction

  return forward, parameters.numpy_params(target)


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


def compare_forward(
  forward: Callable[..., jax.Array],
  params: parameters.Params,
  unet: Any,
  unet_inputs: tuple[Any, ...],
  repeats: int,
) -> None:
  """Times one evaluation of each, and compares the outputs."""
  jitted = jax.jit(forward)

  def jax_forward():
    return jitted(params).block_until_ready()

  def torch_forward():
    with torch.no_grad():
      return unet(*unet_inputs).sample

  print(
    f'compiled in {seconds(jax_forward):.1f} s on {jax.default_backend()}, PyTorch on '
    f'{torch.get_num_threads()} threads'
  )
  actual = np.moveaxis(np.asarray(jax_forward()), -1, 2)
  error = np.abs(actual - torch_forward().numpy()).max()
  times = alternate(jax_forward, torch_forward, repeats)
  report('forward', *times, f'largest difference {error:.1e}')


def compare_training(
  forward: Callable[..., jax.Array],
  params: parameters.Params,
  unet: Any,
  unet_inputs: tuple[Any, ...],
  repeats: int,
) -> None:
  """Times forward pass, backward pass and Adam of each."""
  tx = optax.adam(LEARNING_RATE)

  def loss(params):
    return jnp.mean(jnp.square(forward(params)))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params, moments):
    updates, moments = tx.update(jax.grad(loss)(params), moments)
    return optax.apply_updates(params, updates), moments

  state = (params, tx.init(params))

  def jax_step():
    nonlocal state
    state = jax.block_until_ready(train_step(*state))

  adam = torch.optim.Adam(unet.parameters(), LEARNING_RATE)

  def torch_step():
    adam.zero_grad()
    unet(*unet_inputs).sample.square().mean().backward()
    adam.step()

  print(f'training step compiled in {seconds(jax_step):.1f} s')
  torch_step()
  times = alternate(jax_step, torch_step, repeats)
  report('training step', *times, 'forward, backward, Adam')


def report(name: str, jax_seconds: float, torch_seconds: float, note: str) -> None:
  """Prints both times and their ratio."""
  print(
    f'{name:14} JAX {1e3 * jax_seconds:7.1f} ms   '
    f'PyTorch eager {1e3 * torch_seconds:7.1f} ms   '
    f'ratio {torch_seconds / jax_seconds:.2f}   {note}'
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.side_by_side', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--repeats', type=int, default=15, help='timed calls of each (default: %(default)s)'
  )
  repeats = parser.parse_args().repeats

  inputs = Inputs.draw()
  forward, params = ours(inputs)
  unet, unet_inputs = theirs(inputs, params)
  compare_forward(forward, params, unet, unet_inputs, repeats)
  compare_training(forward, params, unet, unet_inputs, repeats)


if __name__ == '__main__':
  main()

"""A small UNet against PyTorch eager on the same cores: `python -m
benchmarks.side_by_side`.

The same random weights in both (converted by the naming rule), the same inputs,
float32; the PyTorch side is the diffusers class without adapters. Prints the ratio of
median times, PyTorch over JAX, and how far the outputs agree. Needs the test extra.
"""

import argparse
import functools

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

SIZES = dict(
  in_channels=8,
  out_channels=4,
  block_out_channels=(32, 64, 64, 64),
  layers_per_block=1,
  num_attention_heads=(2, 2, 2, 2),
  cross_attention_dim=32,
  addition_time_embed_dim=16,
  projection_class_embeddings_input_dim=48,
)
ROWS, FRAMES, SIDE = 2, 8, 16


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--repeats', type=int, default=15)
  repeats = parser.parse_args().repeats

  graphdef, target = parameters.abstract(
    functools.partial(UNet, UNetConfig(**SIZES, adapters=0))
  )
  params = parameters.numpy_params(target)
  twin = diffusers.UNetSpatioTemporalConditionModel(**SIZES, num_frames=FRAMES)
  twin.load_state_dict({k: torch.tensor(v) for k, v in to_torch(params).items()})
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  x, image, ids = draw(ROWS, FRAMES, SIDE, SIDE, 8), draw(ROWS, 1, 32), draw(ROWS, 3)
  torch_inputs = (
    torch.tensor(np.moveaxis(x, -1, 2).copy()),
    torch.tensor(0.5),
    torch.tensor(image),
    torch.tensor(ids),
  )

  def forward(params):
    unet = parameters.merge(graphdef, params)
    return unet(
      jnp.asarray(x),
      jnp.float32(0.5),
      unet.context_kv(jnp.asarray(image)[:, None]),
      jnp.asarray(ids),
    )[0]

  run = jax.jit(forward)

  def ours():
    return run(params).block_until_ready()

  def theirs():
    with torch.no_grad():
      return twin(*torch_inputs).sample

  print(
    f'compiled in {seconds(ours):.1f} s on {jax.default_backend()}, PyTorch on '
    f'{torch.get_num_threads()} threads'
  )
  error = np.abs(np.moveaxis(np.asarray(ours()), -1, 2) - theirs().numpy()).max()
  report(
    'forward', *alternate(ours, theirs, repeats), f'largest difference {error:.1e}'
  )

  tx = optax.adam(1e-4)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params, state):
    grads = jax.grad(lambda p: jnp.mean(jnp.square(forward(p))))(params)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(params, updates), state

  held = [params, tx.init(params)]

  def ours_step():
    held[:] = jax.block_until_ready(train_step(*held))

  adam = torch.optim.Adam(twin.parameters(), 1e-4)

  def theirs_step():
    adam.zero_grad()
    twin(*torch_inputs).sample.square().mean().backward()
    adam.step()

  print(f'training step compiled in {seconds(ours_step):.1f} s')
  theirs_step()
  report(
    'training step',
    *alternate(ours_step, theirs_step, repeats),
    'forward, backward, Adam',
  )


def report(name: str, ours: float, theirs: float, note: str) -> None:
  print(
    f'{name:14} JAX {1e3 * ours:7.1f} ms   PyTorch eager {1e3 * theirs:7.1f} ms   '
    f'ratio {theirs / ours:.2f}   {note}'
  )


if __name__ == '__main__':
  main()

"""The full-size diffusion training step for 64 devices: shapes only, lowered but not compiled."""

import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
import pytest

from benchmarks.memory_table import abstract_step
from configs import diffusion


@pytest.fixture(scope='module')
def lowered():
  """(arguments, program) of the step on 32 x 2 devices."""
  mesh = AbstractMesh((1, 32, 2), ('data', 'fsdp', 'sequence'), (AxisType.Auto,) * 3)
  with jax.sharding.use_abstract_mesh(mesh):
    step, arguments = abstract_step(diffusion.get_config(), mesh)
    return arguments, step.trace(*arguments).lower(lowering_platforms=('tpu',)).as_text()


def test_everything_large_is_born_in_64_parts(lowered):
  state = lowered[0][0]
  assert sum(x.size for x in state.params.values()) > 1.5e9
  moments = state.opt_state[1][0]
  for tree in (state.params, state.ema, moments.mu, moments.nu):
    assert tree.keys() == state.params.keys()
    for name, x in tree.items():
      assert x.sharding.spec == state.params[name].sharding.spec
      assert x.size < 2**18 or math.prod(x.sharding.shard_shape(x.shape)) == x.size // 64, name
  whole, part = (sum(math.prod(shape(x)) for x in jax.tree.leaves(state)) for shape in (
      lambda x: x.shape, lambda x: x.sharding.shard_shape(x.shape)))
  assert part < whole / 50


def test_masters_are_float32_and_products_bfloat16(lowered):
  (state, *_), program = lowered
  assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
  products = re.findall(r'stablehlo\.(?:convolution|dot_general).* : \((.*)\) ->', program)
  operands = [set(re.findall(r'(\w+)>', re.sub(r'<(?:\d+x)*', '<', types))) for types in products]
  # Float32 are masks and the look-up in the bank; mixed is what flows back from attention's float32 logits.
  assert len(operands) > 1000 and operands.count({'bf16'}) > 0.9 * len(operands)
  assert operands.count({'f32'}) < 0.01 * len(operands)

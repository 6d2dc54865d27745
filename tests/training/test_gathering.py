"""Parameters are gathered by the layers that read them, once more in the backward pass
of a rematerialised block, and their gradients return to slices.
"""

import collections
import functools
import math
import re

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from benchmarks import collectives
from dicetalk_jax import parallel
from dicetalk_jax.models import parameters
from dicetalk_jax.models.unet import REMAT, UNet, UNetConfig
from dicetalk_jax.training import gathering, lora
from dicetalk_jax.training.state import init_state
from dicetalk_jax.training.step import make_train_step

WIDTH = 128
BLOCKS = 6
SGD = optax.sgd(1.0)
ROWS = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
# The sizes of the mesh; devices of 'sequence' share parameters too.
MESHES = {'one': (1, 1, 1), 'fsdp': (1, 8, 1), 'all': (2, 2, 2)}


class Block(nnx.Module):
  """A residual branch whose parameters are larger than its activations."""

  def __init__(self, dtype, *, rngs):
    self.widen = nnx.Linear(WIDTH, 4 * WIDTH, dtype=dtype, rngs=rngs)
    self.narrow = nnx.Linear(4 * WIDTH, WIDTH, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    return x + self.narrow(jnp.tanh(self.widen(x)))


class Stack(nnx.Module):
  def __init__(self, dtype=None, *, rngs):
    self.blocks = nnx.List([Block(dtype, rngs=rngs) for _ in range(BLOCKS)])


def mesh_of(name):
  sizes = MESHES[name]
  return parallel.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


@functools.cache
def lowered(mesh_name, remat='block', *, dtype=None, accum=1, merge=gathering.merge):
  """(step, its arguments) for a stack of blocks, lowered."""
  mesh = mesh_of(mesh_name)
  graphdef, target = parameters.abstract(functools.partial(Stack, dtype))
  run = REMAT[remat](lambda block, x: block(x))

  def loss(params, frozen, batch, key, step):
    x = batch['x']
    for block in merge(graphdef, params | frozen).blocks:
      x = run(block, x)
    return jnp.square(x).mean(), {}

  with jax.set_mesh(mesh):
    params = parallel.put_params(parameters.numpy_params(target), mesh)
    # The last block is frozen.
    frozen = {
      name: params.pop(name) for name in list(params) if f'.{BLOCKS - 1}.' in name
    }
    create = functools.partial(init_state, tx=SGD, ema=False)
    shards = parallel.shardings(jax.eval_shape(create, params), mesh)
    state = jax.jit(create, out_shardings=shards)(params)
    step = make_train_step(loss, SGD, shards, accum=accum)
    batch = parallel.put_batch({'x': ROWS}, mesh)
    arguments = (state, frozen, batch, jax.random.key(0))
    return step.lower(*arguments), arguments


@functools.cache
def compiled(*args, **kwargs):
  """The step of `lowered`, compiled; sums over devices stay apart."""
  step, _ = lowered(*args, **kwargs)
  apart = 'all-reduce-combiner,cpu-all-reduce-combiner'
  return step.compile({'xla_disable_hlo_passes': apart})


def kernels_gathered(program):
  """How often a kernel is gathered, in the forward and in the backward pass."""
  again = [
    'rematted_computation' in origin
    for kind, _, origin in collectives.results(program.as_text())
    if kind == 'all-gather'
  ]
  return again.count(False), again.count(True)


@functools.cache
def trained(mesh_name, **kwargs):
  """Parameters after a step of plain gradient descent."""
  _, (state, *rest) = lowered(mesh_name, **kwargs)
  state = jax.tree.map(jnp.copy, state)  # the step takes it over
  with jax.set_mesh(mesh_of(mesh_name)):
    after, _ = compiled(mesh_name, **kwargs)(state, *rest)
  return parallel.to_host(after.params)


@pytest.mark.parametrize('accum', [1, 2])
@pytest.mark.parametrize('mesh_name', ['fsdp', 'all'])
def test_devices_train_as_one(mesh_name, accum):
  one = trained('one')
  assert len(one) == 4 * (BLOCKS - 1)  # kernels and biases that are not frozen
  for name, x in trained(mesh_name, accum=accum).items():
    np.testing.assert_allclose(x, one[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('accum', [1, 2])
def test_a_rematerialised_block_gathers_its_kernels_twice(accum):
  """Once in the forward and once in the backward pass, of every micro-batch."""
  program = compiled('fsdp', accum=accum)
  assert kernels_gathered(program) == (2 * BLOCKS, 2 * BLOCKS)
  before, _, main = program.as_text().partition('\nENTRY ')
  inside, outside = main, before
  if accum > 1:
    inside, outside = before, main  # of the loop over micro-batches
  assert inside.count(' all-gather(') == 4 * BLOCKS
  assert ' all-gather(' not in outside


def test_products_that_are_kept_need_no_kernel_again():
  assert kernels_gathered(compiled('fsdp', remat='none')) == (2 * BLOCKS, 0)
  forward, backward = kernels_gathered(compiled('fsdp', remat='dots'))
  assert forward == 2 * BLOCKS
  # Every gradient of an input needs its kernel; that of the batch is not asked for.
  assert backward == 2 * BLOCKS - 1


def test_no_gradient_stays_whole():
  """What the devices sum is read only by what makes slices of it."""
  text = compiled('fsdp').as_text()
  whole = 4 * 4 * WIDTH * WIDTH  # bytes of a kernel
  sums = re.findall(r'%([\w.-]+) = (\S+) all-reduce\(', text)
  gradients = [name for name, result in sums if collectives.size(result) == whole]
  assert len(gradients) == 2 * (BLOCKS - 1)
  for name in gradients:
    reads = re.findall(rf' = (\S+) .*\(.*%{re.escape(name)}[,)]', text)
    assert reads
    assert all(collectives.size(result) == whole // 8 for result in reads)


def test_kernels_and_their_gradients_are_sent_in_the_type_of_the_layer():
  step, _ = lowered('fsdp', dtype=jnp.bfloat16)
  kinds = collections.Counter(
    re.findall(
      r'sdy\.sharding_constraint .*, \[(.*)\]> : tensor<(?:128x512|512x128)x(\w+)>',
      step.as_text(),
    )
  )
  whole = {element for layout, element in kinds if 'fsdp' not in layout}
  assert whole == {'bf16'}
  # Cast slices before both gatherings, and gradients after.
  cut = sum(n for (layout, x), n in kinds.items() if 'fsdp' in layout and x == 'bf16')
  assert cut == 2 * 2 * BLOCKS + 2 * (BLOCKS - 1)


def gathers(jaxpr, rematerialised=False):
  """Shapes that are gathered: [in rematerialised blocks, elsewhere]."""
  found = [collections.Counter(), collections.Counter()]
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'sharding_constraint':
      if eqn.params['sharding'].spec == jax.P():
        found[not rematerialised][eqn.outvars[0].aval.shape] += 1
      continue
    inside = rematerialised or eqn.primitive.name == 'remat2'
    for inner in jax.core.jaxprs_in_params(eqn.params):
      found = [a + b for a, b in zip(found, gathers(inner, inside))]
  return found


def test_the_unet_gathers_in_its_blocks():
  """All that belongs to a resnet or a transformer is gathered in there, but for keys
  and values of the contexts, which are made once.
  """
  config = UNetConfig(
    down_block_types=('CrossAttnDownBlockSpatioTemporal',) * 2,
    up_block_types=('UpBlockSpatioTemporal',) * 2,
    block_out_channels=(64, 64),
    num_attention_heads=(2, 2),
    layers_per_block=1,
    cross_attention_dim=64,
    adapters=1,
  )
  graphdef, target = parameters.abstract(functools.partial(UNet, config))
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)

  def forward(params, sample, tokens, ids):
    unet = gathering.merge(graphdef, params)
    kv = unet.context_kv(tokens[:, :, :1], tokens)
    return unet(sample, jnp.zeros(8), kv, ids, remat='block')[0]

  mesh = mesh_of('fsdp')
  with jax.set_mesh(mesh):
    traced = jax.make_jaxpr(forward)(
      target, shape((8, 2, 8, 8, 8)), shape((8, 1, 3, 64)), shape((8, 3))
    )
    shared = {
      name: x.shape
      for name, x in target.items()
      if parallel.param_spec(x.shape, mesh) != jax.P()
    }
  once = re.compile(r'attn2\.(to_[kv]|processor\.to_[kv]_ip\.\d)\.')
  in_blocks = re.compile(r'\.(resnets|attentions)\.')
  expected = [collections.Counter(), collections.Counter()]
  for name, x in shared.items():
    outside = once.search(name) or not in_blocks.search(name)
    expected[bool(outside)][x] += 1
  assert gathers(traced.jaxpr) == expected


def test_low_rank_factors_are_merged_in_slices():
  """As on one device, under `jit` and outside of it, as evaluation does it."""
  config = ml_collections.ConfigDict({'lora': {'rank': 8, 'alpha': 4.0}})
  rng = np.random.default_rng(0)
  shapes = {'': (3, 3, 64, 64), lora.A: (576, 8), lora.B: (8, 64)}
  params = {
    f'a.kernel{end}': rng.normal(size=shape).astype(np.float32)
    for end, shape in shapes.items()
  }
  expected = lora.merged(params, config)['a.kernel']
  mesh = mesh_of('fsdp')
  with jax.set_mesh(mesh):
    placed = parallel.put_params(params, mesh)
    merge = functools.partial(lora.merged, config=config)
    program = jax.jit(merge).lower(placed).compile()
    for merged in (program(placed), merge(placed)):
      kernel = merged['a.kernel']
      assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
      np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-5)
  # Only factors are gathered.
  sizes = {size for _, size, _ in collectives.results(program.as_text())}
  assert sizes == {4 * 576 * 8}

"""What the devices of a mesh send each other in a step of the sampler."""

import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import pytest

from dicetalk_jax import parallel
from dicetalk_jax.diffusion import sampler
from dicetalk_jax.pipeline import Pipeline
from tests import tiny

FRAMES = 28  # seven windows of four frames, and the padding
BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'f16': 2, 'pred': 1}
COLLECTIVE = re.compile(
  r'= (\(?\w+\[.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|'
  r'collective-permute)(?:-start)?\('
)


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation():
    yield


def compiled(folder):
  """The sampler of one clip over eight devices, and the shape of its noise."""
  mesh = parallel.make_mesh(data=-1, fsdp=1)
  pipe = Pipeline.abstract(folder)
  unet = pipe.networks['unet']
  conditions = pipe.encoder.shapes(1, FRAMES, (16, 20))
  everywhere = NamedSharding(mesh, PartitionSpec())

  def placed(tree):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree
    )

  frames = conditions.audio_tokens.shape[1] + pipe.settings.sampler.padding_frames
  noise = jax.ShapeDtypeStruct((1, frames, 10, 8, 4), jnp.float32, sharding=everywhere)
  lengths = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=everywhere)
  sample = sampler.make_sampler(unet.graphdef, pipe.settings.sampler, mesh)
  with jax.set_mesh(mesh):
    lowered = sample.lower(placed(unet.params), noise, placed(conditions), lengths)
    return lowered.compile().as_text(), noise


def sent(program):
  """(kind, bytes of the result) of every collective."""
  calls = []
  for line in program.splitlines():
    if match := COLLECTIVE.search(line):
      arrays = re.findall(r'(\w+)\[([\d,]*)\]', match[1])
      shapes = [(kind, [int(n) for n in dims.split(',') if n]) for kind, dims in arrays]
      size = sum(BYTES[kind] * math.prod(dims) for kind, dims in shapes)
      calls.append((match[2], size))
  return calls


def test_devices_exchange_the_latents_of_the_clip_and_nothing_else(tmp_path_factory):
  """Each call of the network is followed by one sum of the clip's latents and counts.

  Weights, tables of keys and values, and activations stay where they are.
  """
  folder = tiny.shared_model(tmp_path_factory)
  program, noise = compiled(folder)
  calls = sent(program)
  frames = noise.shape[1]
  latents = 4 * math.prod(noise.shape)
  assert sorted(calls) == [('all-reduce', 4 * frames), ('all-reduce', latents)]


def test_collectives_are_found():
  """The pattern knows what XLA prints, with and without layouts and tuples."""
  program = """
  %a.1 = f32[2,3]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %b = (s32[4]{0}, f32[4,2]{1,0}) all-reduce(%y, %z), to_apply=%add
  ROOT %c = (bf16[8]{0}, bf16[8]{0}) collective-permute-start(%w)
  %d = f32[9]{0} add(%p, %all-reduce.3)
  %e = pred[] reduce-scatter(%q)
  """
  assert sent(program) == [
    ('all-gather', 24),
    ('all-reduce', 48),
    ('collective-permute', 32),
    ('reduce-scatter', 1),
  ]

"""Full-size programs of sampling, lowered for NVIDIA GPUs and TPUs."""

import functools

import jax
import pytest

from benchmarks import abstract_programs
from dicetalk_jax import parallel
from dicetalk_jax.models import fused
from tests.lowering import programs
from tests.lowering.programs import ACCELERATORS, CUDNN, TRITON

FRAMES = 25  # the smallest bucket
TRANSFORMERS = 16
# Per transformer: attention within and along frames, and to each adapter's tokens in
# both. The image's single token needs none.
ATTENTIONS = {'dicetalk': TRANSFORMERS * 6, 'sonic': TRANSFORMERS * 4}
VISION_LAYERS = 32
COMMON = {
  'encode',
  'image_token',
  'states',
  'audio_tokens',
  'sample',
  'decode',
  'double',
}
STAGES = {
  'dicetalk': COMMON | {'guide', 'emotion_tokens'},
  'sonic': COMMON | {'motion'},
}


# The sampler of Sonic is that of DICE-Talk with fewer conditions: once is enough.
SONIC = [
  ('sonic', 'cuda'),
  pytest.param('sonic', 'tpu', marks=pytest.mark.slow),
]
SPREAD_SONIC = [
  pytest.param('sonic', platform, marks=pytest.mark.slow) for platform in ACCELERATORS
]
DICETALK = [('dicetalk', platform) for platform in ACCELERATORS]


@functools.cache
def pipeline(kind, spread):
  mesh = parallel.make_mesh(data=-1, fsdp=1) if spread else None
  return abstract_programs.pipeline(kind, mesh)


@functools.cache
def lowered(kind, platform):
  """(programs by stage, conditions) on one device."""
  lower = programs.Lowered(pipeline(kind, False), platform)
  conditions = lower.conditions(FRAMES)
  lower.decode(lower.sample(conditions))
  return lower.text, conditions


@pytest.mark.parametrize(('kind', 'platform'), DICETALK + SONIC)
def test_every_stage_lowers_for_one_device(kind, platform):
  text, _ = lowered(kind, platform)
  assert text.keys() == STAGES[kind]
  fused = {'sample': ATTENTIONS[kind], 'image_token': VISION_LAYERS}
  for name, program in text.items():
    expected = fused.get(name, 0) if platform == 'cuda' else 0
    assert program.count(CUDNN) == expected, name
    assert platform == 'cuda' or not programs.custom_calls(program), name


@pytest.mark.parametrize(('kind', 'platform'), DICETALK + SPREAD_SONIC)
def test_what_is_spread_over_devices_lowers(kind, platform):
  lower = programs.Lowered(pipeline(kind, True), platform)
  lower.decode(lower.sample(lowered(kind, platform)[1]))
  # On a mesh cuDNN's calls are made when the program is divided among the devices.
  calls = programs.custom_calls(lower.text['sample'])
  assert calls['CustomSPMDPartitioning'] == (
    ATTENTIONS[kind] if platform == 'cuda' else 0
  )
  assert set(calls) <= {'CustomSPMDPartitioning', 'Sharding'}


def test_attention_along_the_frames_is_fused_in_sampling():
  text, _ = lowered('dicetalk', 'cuda')
  lengths = programs.fused_lengths(text['sample'])
  assert lengths[FRAMES, FRAMES] == TRANSFORMERS
  assert lengths[4096, 4096] == 5  # two transformers on the way down, three up


def test_fused_kernels_serve_all_sizes():
  lower = programs.Lowered(pipeline('dicetalk', False), 'cuda')
  with fused.kernels():
    lower.sample(lowered('dicetalk', 'cuda')[1])
  program = lower.text['sample']
  # Both cross-attentions of each transformer; the three feed-forwards of those at the
  # top level, two on the way down and three up.
  assert program.count(TRITON) == TRANSFORMERS * 2 + 5 * 3
  assert program.count(CUDNN) == TRANSFORMERS * 2


@pytest.mark.parametrize(('kind', 'platform'), DICETALK + SONIC)
def test_products_are_half_precision_in_the_sampler(kind, platform):
  text, _ = lowered(kind, platform)
  assert programs.share_of_products(text['sample'], {'bf16'}) > 0.9
  assert programs.share_of_products(text['states'], {'f32'}) == 1


def test_shapes_of_the_results_are_those_published():
  _, conditions = lowered('dicetalk', 'tpu')
  assert conditions.reference_latents.shape == (1, 64, 64, 4)
  assert conditions.audio_tokens.shape == (1, FRAMES, 32, 1024)
  assert conditions.emotion_tokens.shape == (1, 32, 1024)
  assert jax.tree.map(lambda x: x.shape, conditions.masks) == tuple(
    (1, side**2) for side in (64, 32, 16, 8)
  )

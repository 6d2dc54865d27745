"""One factor at a time: small training steps, lowered for NVIDIA GPUs and TPUs.

The small UNet has one level, with every kind of layer, heads that cuDNN takes, and an
odd number of frames, as at full size.
"""

import functools

import jax
import pytest

from benchmarks import abstract_programs
from configs import diffusion, embedder
from dicetalk_jax import parallel
from dicetalk_jax.models import attention, target
from dicetalk_jax.training import lora
from dicetalk_jax.training.diffusion import TRAINED
from tests import tiny
from tests.lowering import programs
from tests.lowering.programs import ACCELERATORS, CUDNN, TRITON

FRAMES = 5
WIDTH = 16
CHANGES = {
  'unet': dict(in_channels=8, out_channels=4, block_out_channels=(WIDTH,)),
  'emo_model': dict(classifier_in=WIDTH, num_classes=22, num_heads=1),
  'pose_guider': dict(
    conditioning_embedding_channels=WIDTH, block_out_channels=(4, 4, 4, 4)
  ),
}
SPREAD = {'CustomSPMDPartitioning', 'Sharding'}
# The plain step is always lowered for TPUs; the changes to it once, for NVIDIA GPUs.
PLATFORMS = ('cuda', pytest.param('tpu', marks=pytest.mark.slow))


def small(arg='default', **changes):
  """The configuration of full size with the sizes of `tests.tiny`."""
  config = diffusion.get_config(arg)
  for name in TRAINED:
    if name in config:
      config[name].update(tiny.CONFIGS[name] | CHANGES.get(name, {}))
  if 'sonic' in arg.split(','):
    config.unet.adapters = 1
  config.batch_size = 8
  config.data.frames = config.unet.num_frames = FRAMES
  config.data.size = 64
  config.update_from_flattened_dict(changes)
  return config


def lower(config, platform, **mesh):
  """(names of what is trained, text) of the step.

  It is on a mesh of eight devices, or on one device.
  """
  devices = jax.devices() if mesh else jax.devices()[:1]
  program = abstract_programs.training(
    abstract_programs.diffusion, config, parallel.make_mesh(**mesh, devices=devices)
  )
  state, *_ = program.args
  return set(state.params), program.lower(platform)[0]


@functools.cache
def plain(platform):
  """The step of `small` without changes: which every factor must change."""
  return lower(small(), platform)


def check(program, platform, *, fused=True):
  """Without a mesh: cuDNN for even lengths alone, and only on NVIDIA."""
  assert (CUDNN in program) == (fused and platform == 'cuda')
  assert not any(t % 2 or s % 2 for t, s in programs.fused_lengths(program))
  if platform == 'tpu':
    assert not set(programs.custom_calls(program)) - {'Sharding'}


@pytest.mark.parametrize(
  ('remat', 'platform'),
  [
    ('block', 'cuda'),
    ('block', 'tpu'),
    ('none', 'cuda'),
    ('dots', 'cuda'),
    pytest.param('none', 'tpu', marks=pytest.mark.slow),
    pytest.param('dots', 'tpu', marks=pytest.mark.slow),
  ],
)
def test_rematerialisation(remat, platform):
  trained, program = lower(small(remat=remat), platform)
  check(program, platform)
  assert trained == plain(platform)[0]
  # 'block' is the default. That it is equal shows that the others differ for a reason.
  assert (program == plain(platform)[1]) == (remat == 'block')


@pytest.mark.parametrize('platform', PLATFORMS)
def test_trainable_sets(platform):
  sets = []
  for name in ('adapters', 'adapters_temporal'):
    trained, program = lower(small(trainable=(name,)), platform)
    check(program, platform)
    sets.append(trained)
  adapters, temporal = sets
  assert set() < adapters < temporal < plain(platform)[0]
  added = temporal - adapters
  assert all('.temporal_transformer_blocks.' in name for name in added)


@pytest.mark.parametrize('platform', PLATFORMS)
def test_low_rank_factors(platform):
  config = small(trainable=('adapters',), **{'lora.rank': 4})
  trained, program = lower(config, platform)
  check(program, platform)
  factors = trained - plain(platform)[0]
  kernels = {name.removesuffix(lora.A).removesuffix(lora.B) for name in factors}
  assert factors and factors == {
    kernel + end for kernel in kernels for end in (lora.A, lora.B)
  }
  assert kernels < plain(platform)[0] and not kernels & trained


def test_micro_batches():
  trained, program = lower(small(accum=2), 'cuda')
  check(program, 'cuda')
  assert trained == plain('cuda')[0]
  # The rows of a micro-batch: half of the batch.
  rows = FRAMES * small().batch_size
  whole = f'tensor<{rows}x8x8x{WIDTH}xbf16>'
  half = f'tensor<{rows // 2}x8x8x{WIDTH}xbf16>'
  assert half in program and whole not in program
  assert whole in plain('cuda')[1]


# What presets change is the same on every platform, but for attention on NVIDIA GPUs.
# Each changes the program, if only by a constant.
@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(set(diffusion.VARIANTS) - {'adapters'}))
def test_presets(name):
  _, program = lower(small(name), 'cuda')
  check(program, 'cuda')
  assert program != plain('cuda')[1]


@pytest.mark.parametrize('mesh', [{}, dict(data=8, fsdp=1)])
def test_fused_kernels(mesh):
  """In both passes: blocks are computed again."""
  wide = {
    'unet.block_out_channels': (64,),
    'emo_model.classifier_in': 64,
    'pose_guider.conditioning_embedding_channels': 64,
    'audio_linear.context_tokens': 16,
    'emo_model.tokens': 16,
  }
  _, program = lower(small(fused_kernels=True, **wide), 'cuda', **mesh)
  # The transformer of the middle: three feed-forwards and two cross-attentions.
  assert program.count(TRITON) == 2 * 5
  assert TRITON not in plain('cuda')[1]


def test_the_whole_bank():
  _, program = lower(small(**{'emotion.p_whole_bank': 0.5}), 'cuda')
  check(program, 'cuda')
  assert program != plain('cuda')[1]


@pytest.mark.parametrize(
  ('dtype', 'platform'),
  [
    ('float32', 'cuda'),
    ('float16', 'cuda'),
    pytest.param('float16', 'tpu', marks=pytest.mark.slow),
  ],
)
def test_other_types(dtype, platform):
  _, program = lower(small(dtype=dtype), platform)
  check(program, platform, fused=dtype == 'float16')
  mine = {'float32': {'f32'}, 'float16': {'f16'}}[dtype]
  assert programs.share_of_products(program, mine) > 0.9
  assert programs.share_of_products(plain(platform)[1], {'bf16'}) > 0.9


@pytest.mark.parametrize(
  ('mesh', 'platform'),
  [
    (dict(data=8, fsdp=1), 'cuda'),
    (dict(data=1, fsdp=8), 'cuda'),
    (dict(data=2, fsdp=2, sequence=2), 'cuda'),
    # The other axes: see the full-size step for TPUs.
    (dict(data=8, fsdp=1), 'tpu'),
  ],
)
def test_meshes(mesh, platform):
  _, program = lower(small(), platform, **mesh)
  calls = programs.custom_calls(program)
  fused = platform == 'cuda' and 'sequence' not in mesh
  assert ('CustomSPMDPartitioning' in calls) == fused
  assert set(calls) <= SPREAD


@functools.cache
def lower_embedder(name, platform):
  """(text, metrics) of the embedder's step on one device."""
  config = embedder.get_config(f'tiny,{name}'.removesuffix(',default'))
  config.dtype = 'bfloat16'
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  program = abstract_programs.training(abstract_programs.embedder, config, mesh)
  text, (_, metrics) = program.lower(platform)
  return text, metrics


@pytest.mark.slow
@pytest.mark.parametrize('name', ['default', *embedder.VARIANTS])
def test_presets_of_the_embedder(name):
  """Each changes the program, but `paper_strict`, which pins the defaults."""
  is_plain = name in ('default', 'paper_strict')
  for platform in ACCELERATORS:
    text, metrics = lower_embedder(name, platform)
    assert not set(programs.custom_calls(text)) - {'Sharding'}
    assert {'loss', 'sigma'} <= metrics.keys()
    assert (text == lower_embedder('default', platform)[0]) == is_plain


def test_canary_a_kernel_without_gradient_is_noticed(monkeypatch):
  """The fault that stopped training on NVIDIA GPUs: if this lowers, the tests are
  blind.
  """
  monkeypatch.setattr(attention, 'choose_kernel', lambda *args, **kwargs: 'cudnn')
  for remat in ('none', 'block'):
    refused = pytest.raises(NotImplementedError, match='sequence length Q 5')
    # Another capability, so that no good trace is taken, and no bad one is left.
    with refused, monkeypatch.context() as patch:
      broken = functools.partial(target.compiling_for, capability=8.6)
      patch.setattr(target, 'compiling_for', broken)
      lower(small(remat=remat), 'cuda')

"""Presets: the settings and parameters that each of them changes, and no others."""

import functools
import importlib
import re

import jax
import pytest

from configs import autoencoder, diffusion, embedder
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.training.diffusion import TRAINED, DiffusionTask
from dicetalk_jax.training.embedder import EmbedderTask
from dicetalk_jax.training.optimizer import make_optimizer
from dicetalk_jax.training.state import init_state, partition


def flat(config):
  """The settings by name; those of a section are named `section.key`."""
  settings = {}
  for key, value in config.to_dict().items():
    if isinstance(value, dict):
      settings |= {f'{key}.{name}': inner for name, inner in value.items()}
    else:
      settings[key] = value
  return settings


@pytest.mark.parametrize(
  ('module', 'name'),
  [(module, name) for module in (diffusion, embedder) for name in module.VARIANTS],
)
@pytest.mark.parametrize('base', ['default', 'tiny'])
def test_a_preset_changes_what_it_says_and_nothing_else(module, name, base):
  preset = name if base == 'default' else f'{base},{name}'
  plain = flat(module.get_config(base))
  changed = flat(module.get_config(preset))
  changes = module.VARIANTS[name]
  for key in plain.keys() | changed.keys():
    section = key.partition('.')[0]
    if section in changes and changes[section] is None:
      assert key not in changed
    elif base == 'tiny' and key in ('embedder.expr_dim', 'data.corpora'):
      pass  # tiny data is synthetic, and has its own width
    else:
      assert changed[key] == changes.get(key, plain[key]), key


@pytest.mark.parametrize(
  ('module', 'name'),
  [(module, name) for module in (diffusion, embedder) for name in module.VARIANTS],
)
def test_the_order_of_presets_does_not_matter(module, name):
  assert module.get_config(f'tiny,{name}') == module.get_config(f'{name},tiny')


@pytest.mark.parametrize(
  ('module', 'arg', 'sentence'),
  [
    (
      diffusion,
      'tiny,huge',
      "unknown preset 'huge'; this file has: default, tiny, paper_strict",
    ),
    (
      diffusion,
      'abl_no_bank,abl_learnable_ca',
      'contradict each other in config.emo_model.mode',
    ),
    (diffusion, 'sonic,abl_no_prior', 'contradict each other in config.emotion.sample'),
    (diffusion, 'svp,sonic', 'contradict each other in config.emo_model.mode'),
    (
      embedder,
      'video_only,audio_only',
      'contradict each other in config.embedder.modalities',
    ),
    (embedder, 'default,tiny', "'default' alone"),
    (autoencoder, 'tiny,tiny', 'each name once'),
  ],
)
def test_presets_that_do_not_go_together(module, arg, sentence):
  with pytest.raises(ValueError, match=sentence):
    module.get_config(arg)


@pytest.mark.parametrize('module', [autoencoder, diffusion, embedder])
def test_the_tiny_preset_adds_only_random_networks(module):
  """Every other setting of it can be changed at full size, too."""
  added = flat(module.get_config('tiny')).keys() - flat(module.get_config()).keys()
  assert added == {'frozen.whisper', 'frozen.image_encoder'}


@functools.cache
def full_size_shapes(task, arg, component):
  """Parameter shapes of a component by name, at full size; empty if there is none."""
  config = importlib.import_module(f'configs.{task}').get_config(arg)
  if component not in config:
    return {}
  build = registry.builder(component, config[component].to_dict())
  _, target = parameters.abstract(build)
  return {name: x.shape for name, x in target.items()}


def diffusion_shapes(arg, components):
  return {
    f'{component}.{name}': shape
    for component in components
    for name, shape in full_size_shapes('diffusion', arg, component).items()
  }


# The parameters that a preset leaves out.
NONE = r'^$'
LEFT_OUT = {
  'paper_strict': NONE,
  'adapters': NONE,
  'abl_no_cls': NONE,
  'abl_no_prior': NONE,
  'abl_no_bank': r'^emo_model\.(codebook|kv_tokens_linear|attention)\.',
  'svp': r'^emo_model\.(codebook|kv_tokens_linear|attention)\.',
  'abl_learnable_ca': r'^emo_model\.codebook\.fc\.',
  'sonic': r'^(emo_model|pose_guider)\.',
}


@pytest.mark.parametrize('arg', LEFT_OUT)
def test_unet_of_a_diffusion_preset(arg):
  """Its names are the published ones, see tests/models/test_unet.py."""
  changes = {'adapters': 1} if arg == 'sonic' else {}
  plain = diffusion.get_config().unet.to_dict()
  assert diffusion.get_config(arg).unet.to_dict() == plain | changes


@pytest.mark.parametrize('arg', LEFT_OUT)
def test_parameters_of_a_diffusion_preset(arg):
  components = [name for name in TRAINED if name != 'unet']
  plain = diffusion_shapes('default', components)
  kept = {
    name: shape for name, shape in plain.items() if not re.search(LEFT_OUT[arg], name)
  }
  assert diffusion_shapes(arg, components) == kept
  assert (kept == plain) == (LEFT_OUT[arg] == NONE)


def embedder_shapes(arg):
  return full_size_shapes('embedder', arg, 'embedder')


def changed_shapes(arg):
  """Names of the parameters that a preset adds, or gives another shape."""
  plain = embedder_shapes('default')
  return {
    name for name, shape in embedder_shapes(arg).items() if shape != plain.get(name)
  }


@pytest.mark.parametrize('arg', ['svp', 'video_only', 'audio_only'])
def test_presets_of_the_embedder_that_change_no_parameter(arg):
  assert embedder_shapes(arg) == embedder_shapes('default')


def test_parameters_of_the_embedder_of_mediapipe_expressions():
  assert changed_shapes('mediapipe') == {
    'expr_mean',
    'expr_std',
    'visual.linear_in.kernel',
  }
  _, held = partition(
    {f'embedder.{name}': 0 for name in embedder_shapes('mediapipe')},
    ('all',),
    sets=EmbedderTask.sets,
    constants=EmbedderTask.constants,
  )
  assert set(held) == {'embedder.expr_mean', 'embedder.expr_std'}


def test_parameters_of_the_embedder_of_crops():
  expected = {'visual.linear_in.kernel'}
  for i in range(5):
    expected |= {
      f'crop_encoder.convs.{i}.kernel',
      f'crop_encoder.convs.{i}.bias',
      f'crop_encoder.norms.{i}.scale',
      f'crop_encoder.norms.{i}.bias',
    }
  assert changed_shapes('crops') == expected
  assert embedder_shapes('default').keys() < embedder_shapes('crops').keys()


@pytest.mark.parametrize(
  ('name', 'unet'),
  [
    ('all', ''),
    ('adapters', r'\.processor\.to_[kv]_ip\.'),
    ('adapters_temporal', r'\.processor\.to_[kv]_ip\.|\.temporal_transformer_blocks\.'),
  ],
)
def test_frozen_parameters_carry_no_optimizer_state(name, unet):
  """At full size; of the UNet, only what matches the pattern `unet` is trained."""
  config = diffusion.get_config()
  shapes = {
    key: jax.ShapeDtypeStruct(shape, 'float32')
    for key, shape in diffusion_shapes('default', TRAINED).items()
  }
  trained, held = partition(shapes, (name,), sets=DiffusionTask.sets)
  expected = {
    key for key in shapes if not key.startswith('unet.') or re.search(unet, key)
  }
  assert set(trained) == expected
  assert set(held) == shapes.keys() - expected
  assert bool(held) == bool(unet)

  tx = make_optimizer(config.optim, config.total_steps, DiffusionTask.new_modules)
  state = jax.eval_shape(functools.partial(init_state, tx=tx, ema=True), trained)
  named = [path[-1].key for path, x in jax.tree.leaves_with_path(state) if x.ndim]
  assert set(named) == expected
  # The values, their average and the two moments of the optimizer.
  assert len(named) == 4 * len(expected)

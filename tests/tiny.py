"""Model folders of DICE-Talk and Sonic, as small as possible, and inputs for them."""

import contextlib
import functools
import json
from unittest import mock

import jax
import numpy as np
import soundfile

from dicetalk_jax import bundle, pipeline
from dicetalk_jax.component import Component
from dicetalk_jax.models import parameters, registry

EMOTIONS = ('happy', 'sad')
FACE_BOX = (12.0, 10.0, 40.0, 44.0)

CONFIGS = {
  'unet': dict(
    block_out_channels=(8,),
    norm_num_groups=4,
    layers_per_block=1,
    num_attention_heads=(2,),
    cross_attention_dim=8,
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=12,
    down_block_types=('DownBlockSpatioTemporal',),
    up_block_types=('UpBlockSpatioTemporal',),
  ),
  'vae': dict(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
  ),
  'image_encoder': dict(
    hidden_size=16,
    intermediate_size=16,
    projection_dim=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
  ),
  'whisper': dict(
    d_model=8, encoder_layers=1, encoder_attention_heads=1, encoder_ffn_dim=8
  ),
  'audio_linear': dict(
    blocks=2, channels=8, intermediate_dim=8, output_dim=8, context_tokens=2
  ),
  'pose_guider': dict(conditioning_embedding_channels=8, block_out_channels=(4, 4)),
  'emo_model': dict(
    prior_dim=6,
    dim=8,
    intermediate_dim=8,
    tokens=2,
    codebook_size=4,
    num_heads=2,
    classifier_in=8,
    classifier_hidden=(8, 8),
    num_classes=3,
  ),
  'flownet': dict(c=4),
}
# Makes the priors; it reads the states of the Whisper above.
EMBEDDER = dict(
  expr_dim=64,
  whisper_dim=8,
  whisper_states=2,
  width=6,
  heads=2,
  mlp_dim=8,
  visual_layers=1,
  audio_layers=1,
  fusion_layers=1,
  dropout=0.0,
  max_len=12,
)
EMBEDDER_OF_CROPS = EMBEDDER | dict(visual='crops', crop_size=8, crop_channels=(4,))
# The networks that compute the features of a data set.
FEATURE_CONFIGS = {
  **{name: CONFIGS[name] for name in ('vae', 'image_encoder', 'whisper')},
  'embedder': EMBEDDER,
}
SONIC_CONFIGS = {
  **{
    name: CONFIGS[name] for name in ('vae', 'image_encoder', 'whisper', 'audio_linear')
  },
  'unet': CONFIGS['unet'] | dict(adapters=1),
  'audio2bucket': dict(channels=8, clip_dim=8, intermediate_dim=8),
}
SETTINGS = dict(
  image_size=16,
  multiple=2,
  decode_chunk=3,
  sampler=dict(num_steps=2, frames=4, shift=1, g_image=1.5, g_condition=2.0),
)
SONIC_SETTINGS = SETTINGS | dict(
  kind='sonic', upcast_vae=False, sampler=SETTINGS['sampler'] | dict(padding=False)
)


def component(name, config) -> Component:
  """A component with random parameters."""
  graphdef, params = _drawn(name, json.dumps(config))
  return Component(registry.config_of(name, config), graphdef, dict(params))


@functools.cache
def _drawn(name, config: str):
  graphdef, shapes = parameters.abstract(registry.builder(name, json.loads(config)))
  return graphdef, parameters.numpy_params(shapes)


def save_components(folder, configs) -> None:
  """Writes components with random parameters into a model folder."""
  for name, config in configs.items():
    made = component(name, config)
    bundle.save_component(
      folder, name, made.config.to_json(), made.params, {'source': 'test'}
    )


def save_model(folder, configs=CONFIGS, settings=SETTINGS, emotions=EMOTIONS) -> None:
  """Writes a model folder with random parameters and priors."""
  save_components(folder, configs)
  bundle.save_settings(folder, settings)
  rng = np.random.default_rng(0)
  priors = {name: (rng.normal(size=6), np.ones(6)) for name in emotions}
  bundle.save_priors(folder, priors)


def shared_model(tmp_path_factory):
  """The folder of DICE-Talk, written once per test run; not to be changed."""
  folder = tmp_path_factory.getbasetemp() / 'tiny_model'
  if not folder.exists():
    save_model(folder)
  return folder


def shared_sonic(tmp_path_factory):
  """The folder of Sonic, likewise."""
  folder = tmp_path_factory.getbasetemp() / 'tiny_sonic'
  if not folder.exists():
    save_model(folder, SONIC_CONFIGS, SONIC_SETTINGS, emotions=())
  return folder


def model_without(folder, place, component: str):
  """A model folder in `place` that shares all files of `folder` but lacks one
  component.
  """
  for path in folder.iterdir():
    if path.name != bundle.INDEX:
      (place / path.name).symlink_to(path)
  index = json.loads((folder / bundle.INDEX).read_text())
  del index['components'][component]
  (place / bundle.INDEX).write_text(json.dumps(index))
  return place


@contextlib.contextmanager
def quick_compilation():
  """Compiles less optimised programs, in half the time."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@contextlib.contextmanager
def shared_programs():
  """Lets equal components, and equal samplers, share their compiled programs.

  Every command loads its components again, and would compile the same programs again.
  """
  load = Component.load
  known = {}

  def load_or_known(*args, **kwargs):
    loaded = load(*args, **kwargs)
    key = loaded.graphdef, loaded.mesh, loaded.fingerprint
    return known.setdefault(key, loaded)

  known_sampler = functools.cache(pipeline.make_sampler)
  with (
    mock.patch.object(Component, 'load', load_or_known),
    mock.patch.object(pipeline, 'make_sampler', known_sampler),
  ):
    yield


def portrait() -> np.ndarray:
  """uint8 `[80, 64, 3]`: structured noise, no face that a detector would find."""
  rng = np.random.default_rng(1)
  return rng.integers(0, 255, (10, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)


def speech(seconds: float = 0.8) -> np.ndarray:
  """float32 `[samples]` at 16 kHz."""
  t = np.arange(int(16000 * seconds)) / 16000
  return np.float32(0.3 * np.sin(2 * np.pi * 150 * t) * np.sin(2 * np.pi * 3 * t))


def write_speech(path, wave=None) -> None:
  soundfile.write(path, speech() if wave is None else wave, 16000)

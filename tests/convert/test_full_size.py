"""Every name and shape of the published files at full size, without memory."""

import json
import re

import pytest
import torch

from convert import naming, published_layouts
from convert.component_check import Part, fit
from dicetalk_jax.models import registry
from tests.models.parity import MANIFESTS

CONFIGS = {
  name: entry['value']
  for name, entry in json.loads((MANIFESTS / 'configs.json').read_text()).items()
}

# Manifest -> component, its configuration, and the keys that are not of the component.
PUBLISHED = {
  'unet_svd_xt': ('unet', CONFIGS['unet_config'] | dict(adapters=0), None),
  'unet_dicetalk': ('unet', CONFIGS['unet_config'] | dict(adapters=2), None),
  'unet_sonic': ('unet', CONFIGS['unet_config'] | dict(adapters=1), None),
  'vae_temporal_decoder': ('vae', CONFIGS['vae_config'], None),
  'clip_vision_h14': ('image_encoder', CONFIGS['image_encoder_config'], None),
  'whisper_tiny': (
    'whisper',
    CONFIGS['whisper_tiny_config'],
    published_layouts.WHISPER_UNUSED,
  ),
  'audio_linear': (
    'audio_linear',
    CONFIGS['dicetalk_component_arguments']['audio_projection'],
    None,
  ),
  'pose_guider': (
    'pose_guider',
    CONFIGS['dicetalk_component_arguments']['pose_guider'],
    None,
  ),
  'emo_model': (
    'emo_model',
    CONFIGS['dicetalk_component_arguments']['emotion_model'],
    None,
  ),
  'rife_flownet': ('flownet', {}, None),
  'sonic_audio2token': ('audio_linear', {}, None),
  'sonic_audio2bucket': ('audio2bucket', {}, None),
}


@pytest.mark.parametrize('manifest', PUBLISHED)
def test_names_and_shapes(manifest):
  name, config, unused = PUBLISHED[manifest]
  shapes = {
    key: entry['shape']
    for key, entry in json.loads((MANIFESTS / f'{manifest}.json').read_text()).items()
  }
  tensors = {key: torch.empty(shape, device='meta') for key, shape in shapes.items()}
  if name == 'flownet':
    tensors = published_layouts.without_prefix(
      tensors, published_layouts.FLOWNET_PREFIX
    )
  tensors = {
    key: x for key, x in tensors.items() if unused is None or not re.match(unused, key)
  }
  fitted = fit(Part(name, config, tensors, (), ''))
  assert not fitted.problems and not fitted.left_over
  assert set(fitted.keys.values()) == set(tensors)
  assert all(naming.torch_name(ours) == key for ours, key in fitted.keys.items())


@pytest.mark.parametrize(
  'kind, name',
  [
    (kind, name)
    for kind, release in published_layouts.RELEASES.items()
    for name in release.files
  ],
)
def test_defaults_are_the_published_sizes(kind, name):
  """The releases have no configuration next to their files."""
  release = published_layouts.RELEASES[kind]
  stem = release.files[name].removesuffix('.pth')
  manifest = (
    f'unet_{kind}' if name == 'unet' else f'sonic_{stem}' if kind == 'sonic' else stem
  )
  config = {**registry.COMPONENTS[name][0]().to_json(), **release.sizes.get(name, {})}
  tensors = {
    key: torch.empty(entry['shape'], device='meta')
    for key, entry in json.loads((MANIFESTS / f'{manifest}.json').read_text()).items()
  }
  assert not fit(Part(name, config, tensors, (), '')).problems

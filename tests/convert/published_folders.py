"""Downloads in the published layouts, small and random, for tests of the converter."""

import functools
import json
import pathlib
import re

import diffusers
import numpy as np
import torch
import transformers

from convert import naming, published_layouts
from dicetalk_jax.models import parameters, registry

# The published classes have 32 groups per norm, so widths are multiples of 32.
UNET = dict(
  block_out_channels=[32, 64],
  layers_per_block=1,
  num_attention_heads=[2, 2],
  cross_attention_dim=16,
  down_block_types=['CrossAttnDownBlockSpatioTemporal', 'DownBlockSpatioTemporal'],
  up_block_types=['UpBlockSpatioTemporal', 'CrossAttnUpBlockSpatioTemporal'],
  addition_time_embed_dim=8,
  projection_class_embeddings_input_dim=24,
)
VAE = dict(
  block_out_channels=[32, 32],
  layers_per_block=2,
  down_block_types=['DownEncoderBlock2D'] * 2,
)
CLIP = dict(
  hidden_size=16,
  intermediate_size=16,
  num_hidden_layers=1,
  num_attention_heads=2,
  image_size=28,
  patch_size=14,
  projection_dim=16,
  hidden_act='gelu',
)
WHISPER = dict(
  d_model=8,
  encoder_layers=2,
  encoder_attention_heads=1,
  encoder_ffn_dim=8,
  decoder_layers=1,
  decoder_attention_heads=1,
  decoder_ffn_dim=8,
  vocab_size=9,
  pad_token_id=1,
  bos_token_id=1,
  eos_token_id=1,
  decoder_start_token_id=1,
)
DICETALK = {
  'unet': UNET | dict(adapters=2),
  'audio_linear': dict(
    blocks=3, channels=8, intermediate_dim=8, output_dim=16, context_tokens=2
  ),
  'pose_guider': dict(conditioning_embedding_channels=32, block_out_channels=[4, 4]),
  'emo_model': dict(
    prior_dim=6,
    dim=16,
    intermediate_dim=8,
    tokens=2,
    codebook_size=4,
    num_heads=2,
    classifier_in=8,
    classifier_hidden=[8, 8],
    num_classes=3,
  ),
  'flownet': dict(c=4),
}
SONIC = {
  'unet': UNET | dict(adapters=1),
  'audio_linear': DICETALK['audio_linear'],
  'audio2bucket': dict(channels=8, clip_dim=16, intermediate_dim=8),
  'flownet': DICETALK['flownet'],
}
SIZES = dict(dicetalk=DICETALK, sonic=SONIC)
SCHEDULER = dict(
  prediction_type='v_prediction',
  use_karras_sigmas=True,
  timestep_type='continuous',
  sigma_min=0.002,
  sigma_max=700.0,
  timestep_spacing='leading',
  steps_offset=1,
  beta_schedule='scaled_linear',
)


def with_noise(module: torch.nn.Module) -> torch.nn.Module:
  """Adds noise, so that nothing stays zero or one."""
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for parameter in module.parameters():
      parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
  return module


def svd_modules() -> dict[str, torch.nn.Module]:
  torch.manual_seed(0)
  return {
    'unet': with_noise(diffusers.UNetSpatioTemporalConditionModel(**UNET)),
    'vae': with_noise(diffusers.AutoencoderKLTemporalDecoder(**VAE)),
    'image_encoder': with_noise(
      transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**CLIP))
    ),
  }


def save_svd(folder: pathlib.Path, half: bool = False, **options) -> pathlib.Path:
  """Saves a folder of Stable Video Diffusion; `options` go to `save_pretrained`."""
  for name, module in svd_modules().items():
    if half:
      module = module.half()
    module.save_pretrained(folder / name, **options)
  diffusers.EulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / 'scheduler')
  return folder


def save_whisper(folder: pathlib.Path, pickled: bool = False) -> pathlib.Path:
  """Saves a folder of Whisper.

  Like the published one, it comes from the class with a head: keys start with `model.`.
  """
  torch.manual_seed(0)
  module = with_noise(
    transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER))
  )
  module.save_pretrained(folder)
  if pickled:
    (folder / 'model.safetensors').unlink()
    torch.save(module.state_dict(), folder / 'pytorch_model.bin')
  return folder


@functools.cache
def _params(name: str, kind: str) -> dict[str, np.ndarray]:
  _, shapes = parameters.abstract(registry.builder(name, SIZES[kind][name]))
  return naming.to_torch(parameters.numpy_params(shapes))


def state_dict(name: str, kind: str = 'dicetalk') -> dict[str, torch.Tensor]:
  """Makes random tensors of one component of a release, by published keys."""
  return {key: torch.from_numpy(x.copy()) for key, x in _params(name, kind).items()}


def save_rife(folder: pathlib.Path) -> pathlib.Path:
  """Saves the folder of RIFE.

  Its file has the old format. The keys have a prefix, except one that is ignored.
  """
  folder.mkdir()
  state = {f'module.{key}': x for key, x in state_dict('flownet').items()}
  torch.save(
    state | {'epoch': torch.zeros(1)},
    folder / published_layouts.FLOWNET,
    _use_new_zipfile_serialization=False,
  )
  return folder


def save_release(folder: pathlib.Path, kind: str) -> pathlib.Path:
  """Saves a release folder, with our configuration of its small sizes next to it."""
  release = published_layouts.RELEASES[kind]
  folder.mkdir(parents=True)
  for name, file in release.files.items():
    torch.save(state_dict(name, kind), folder / file)
  (folder / release.config).write_text(json.dumps(dict(components=SIZES[kind])))
  return folder


def save_dicetalk(folder: pathlib.Path) -> pathlib.Path:
  return save_release(folder, 'dicetalk')


def adapters_from(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
  """Makes adapters as the reference implementation initialises them."""
  adapters = {}
  for key, value in base.items():
    found = re.fullmatch(r'(.*attn2)\.to_([kv])\.weight', key)
    if found:
      layer, letter = found.groups()
      for i in range(2):
        adapters[f'{layer}.processor.to_{letter}_ip.{i}.weight'] = value
  return adapters

"""Where published folders keep each component, and under which terms. Source: the published folders."""

import pathlib
from typing import Any

from convert import published
from convert.part import Part
from dicetalk_jax.errors import InputError
from dicetalk_jax.models import registry

# Component -> its folder in stable-video-diffusion-img2vid-xt and -xt-1-1, its class, and what ours needs not know.
SVD = {
    'unet': dict(_class_name='UNetSpatioTemporalConditionModel', sample_size=96),
    'vae': dict(_class_name='AutoencoderKLTemporalDecoder'),
    'image_encoder': dict(architectures=['CLIPVisionModelWithProjection'], model_type='clip_vision_model'),
}
SCHEDULER = pathlib.PurePath('scheduler/scheduler_config.json')

# Component -> file of the DICE-Talk release, and the class defaults that its program builds it with.
DICETALK = {'unet': 'unet.pth', 'audio_linear': 'audio_linear.pth', 'pose_guider': 'pose_guider.pth',
            'emo_model': 'emo_model.pth'}
DICETALK_CONFIG = 'dicetalk.json'  # ours: sizes and settings of an exported model; the published folder has none

FLOWNET = 'flownet.pkl'  # of the RIFE release
FLOWNET_PREFIX = 'module.'

WHISPER_PREFIX = 'model.'
WHISPER_DECODER = 'whisper_decoder'  # the component that carries what our encoder has no use for
WHISPER_UNUSED = r'(decoder|proj_out)\.'
WHISPER = dict(architectures=['WhisperModel'], model_type='whisper')
WHISPER_FEATURES = dict(
    chunk_length=30, feature_extractor_type='WhisperFeatureExtractor', hop_length=160, n_fft=400, n_samples=480000,
    nb_max_frames=3000, padding_side='right', padding_value=0.0, return_attention_mask=False, sampling_rate=16000)

LICENCES = dict(
    svd='Stability AI community licence', dicetalk='CC BY-NC-SA 4.0', whisper='MIT (see the model card)',
    rife='MIT (see the code it was published with)')


def folder_part(name: str, folder: pathlib.Path, licence: str, **config: Any) -> Part:
  """A component from a diffusers or transformers folder (`config.json` beside weights).

  Args:
    name: of the component.
    folder: of the component.
    licence: see `LICENCES`.
    **config: what the published configuration does not say.

  Raises:
    InputError, WeightsError: the folder is incomplete or damaged.
  """
  if not folder.is_dir():
    raise InputError(f'{folder} is not a folder; give the downloaded folder of the model')
  path = published.weights_in(folder)
  mapping = published.read_json(folder / 'config.json') | config
  return Part(name, mapping, published.load(path), published.files_of(path), LICENCES[licence])


def file_part(name: str, path: pathlib.Path, licence: str, config: dict[str, Any] | None = None, **options) -> Part:
  """A component from one file without a configuration; `config` replaces class defaults."""
  mapping = registry.COMPONENTS[name][0]().to_json() | (config or {})
  return Part(name, mapping, published.load(path), (path,), LICENCES[licence], **options)


def without_prefix(tensors: published.StateDict, prefix: str) -> published.StateDict:
  """Takes a prefix off the keys that have it."""
  return {key.removeprefix(prefix): x for key, x in tensors.items()}

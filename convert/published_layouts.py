"""Where published folders keep each component, and under which licence.

Source: the published folders.
"""

from collections.abc import Callable, Mapping
import pathlib
from typing import Any, NamedTuple

from convert import torch_files
from convert.component_check import Part, without_wrapper
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.models import registry

# Component -> entries of its published configuration that our classes do not read. Its
# folder in stable-video-diffusion-img2vid-xt and -xt-1-1 is named after the component.
SVD: dict[str, dict[str, Any]] = {
  'unet': dict(_class_name='UNetSpatioTemporalConditionModel', sample_size=96),
  'vae': dict(_class_name='AutoencoderKLTemporalDecoder'),
  'image_encoder': dict(
    architectures=['CLIPVisionModelWithProjection'], model_type='clip_vision_model'
  ),
}
SCHEDULER = pathlib.PurePath('scheduler/scheduler_config.json')

# Component -> file of a release. The files are state dicts without a configuration.
DICETALK = {
  'unet': 'unet.pth',
  'audio_linear': 'audio_linear.pth',
  'pose_guider': 'pose_guider.pth',
  'emo_model': 'emo_model.pth',
}
# Sizes and settings of an exported model. The published folder has no such file.
DICETALK_CONFIG = 'dicetalk.json'
SONIC = {
  'unet': 'unet.pth',
  'audio_linear': 'audio2token.pth',
  'audio2bucket': 'audio2bucket.pth',
}


class Release(NamedTuple):
  """A folder of state dicts.

  Attributes:
    files: file of each component.
    config: the name of our configuration file in an exported folder.
    sizes: configuration by component, where the release differs from the defaults of
      our classes.
  """

  files: Mapping[str, str]
  config: str
  sizes: Mapping[str, Mapping[str, Any]]


# By kind of model, as the settings in `bundle.json` name it.
RELEASES = {
  'dicetalk': Release(DICETALK, DICETALK_CONFIG, {}),
  'sonic': Release(SONIC, 'sonic.json', {'unet': dict(adapters=1)}),
}


def release_of(settings: Mapping[str, Any]) -> Release:
  """Finds the release that a model folder with these settings belongs to.

  Raises:
    WeightsError: the kind of the model is unknown here.
  """
  kind = settings.get('kind', 'dicetalk')
  if kind not in RELEASES:
    raise WeightsError(
      f'the model folder is of the unknown kind {kind!r} (known: '
      f'{", ".join(RELEASES)}); update the program'
    )
  return RELEASES[kind]


FLOWNET = 'flownet.pkl'  # of the RIFE release
FLOWNET_PREFIX = 'module.'

TAESDV = 'taesdv.pth'

WHISPER_PREFIX = 'model.'
WHISPER_DECODER = 'whisper_decoder'  # carries what our encoder does not use
WHISPER_UNUSED = r'(decoder|proj_out)\.'
WHISPER = dict(architectures=['WhisperModel'], model_type='whisper')
WHISPER_FEATURES = dict(
  chunk_length=30,
  feature_extractor_type='WhisperFeatureExtractor',
  hop_length=160,
  n_fft=400,
  n_samples=480000,
  nb_max_frames=3000,
  padding_side='right',
  padding_value=0.0,
  return_attention_mask=False,
  sampling_rate=16000,
)

LICENCES = dict(
  svd='Stability AI community licence',
  dicetalk='CC BY-NC-SA 4.0',
  sonic='CC BY-NC-SA 4.0',
  whisper='MIT (see the model card)',
  rife='MIT (see the code it was published with)',
  taesdv='MIT (see the code it was published with)',
  face_detector='GPL-3.0 (YOLOv5-face) and the terms of the DICE-Talk release',
)


def folder_part(
  name: str, folder: pathlib.Path, licence: str, prefix: str = '', **config: Any
) -> Part:
  """Reads a component from a diffusers or transformers folder.

  Args:
    name: of the component.
    folder: of the component, with `config.json` next to the weights.
    licence: a key of `LICENCES`.
    prefix: that the published keys may have.
    **config: values that the published configuration lacks.

  Raises:
    InputError, WeightsError: the folder is incomplete or damaged.
  """
  if not folder.is_dir():
    raise InputError(
      f'{folder} is not a folder; give the downloaded folder of the model'
    )
  path = torch_files.weights_in(folder)
  weights = torch_files.read(path)
  part = Part(
    name,
    config=torch_files.read_json(folder / 'config.json') | config,
    tensors=weights.tensors,
    files=torch_files.files_of(path),
    licence=LICENCES[licence],
    notes=weights.notes,
  )
  return without_wrapper(part, prefix)


def file_part(
  name: str,
  path: pathlib.Path,
  licence: str,
  config: dict[str, Any] | None = None,
  prefix: str = '',
  read: Callable[[pathlib.Path], torch_files.Weights] = torch_files.read,
  **options,
) -> Part:
  """Reads a component from one file without a configuration.

  Args:
    name: of the component.
    path: of the file.
    licence: a key of `LICENCES`.
    config: values that replace the defaults of the class.
    prefix: that the published keys have.
    read: reads the file.
    **options: further attributes of `Part`.
  """
  defaults = registry.COMPONENTS[name][0]().to_json()
  weights = read(path)
  part = Part(
    name,
    config=defaults | (config or {}),
    tensors=weights.tensors,
    files=(path,),
    licence=LICENCES[licence],
    notes=weights.notes,
    **options,
  )
  return without_wrapper(part, prefix)


def without_prefix(
  tensors: torch_files.StateDict, prefix: str
) -> torch_files.StateDict:
  """Removes a prefix from the keys that have it."""
  return {key.removeprefix(prefix): x for key, x in tensors.items()}

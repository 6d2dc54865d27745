"""The kinds of golden files: how they are recognised, and what reproduces them.

To add a kind, write a function from `Golden` to `Case`s and list it in `KINDS`.
"""

from collections.abc import Callable, Iterator, Mapping
import pathlib
from typing import Any, NamedTuple

import jax

from convert.torch_files import read_json
from convert.verify import face_cases, full_size_cases, module_cases, pipeline_cases
from convert.verify.golden import Case, Golden
from dicetalk_jax.errors import InputError
from dicetalk_jax.files import walk

# File names by what they hold, as `Golden` takes them.
_STANDARD = {'weights': 'weights', 'inputs': 'inputs', 'outputs': 'outputs'}
_WHOLE = {'inputs': 'inputs', 'outputs': 'outputs'}
_TENSORS = {'inputs': 'tensors', 'outputs': 'tensors'}
_NEXT_TO = {'inputs': '{stem}', 'outputs': '{stem}'}


class Kind(NamedTuple):
  """One kind of golden files.

  Attributes:
    mark: path of keys that only descriptions of this kind have.
    cases: runs all cases of golden files.
    files: names of the tensor files, as `Golden` takes them.
  """

  mark: str
  cases: Callable[[Golden], Iterator[Case]]
  files: Mapping[str, str] = _STANDARD


KINDS = {
  'audio_proj': Kind('constructor.context_tokens', module_cases.audio_projection),
  'pose_guider': Kind('constructor.conditioning_channels', module_cases.pose_guider),
  'emotion_model': Kind('constructor.codebook_size', module_cases.emotion_model),
  'whisper': Kind('constructor.encoder_layers', module_cases.whisper),
  'clip_vision': Kind('constructor.patch_size', module_cases.clip_vision),
  'vae': Kind('constructor.latent_channels', module_cases.vae),
  'unet': Kind('constructor.cross_attention_dim', module_cases.unet),
  'rife': Kind('constructor.in_planes', module_cases.rife),
  'mask_downsample': Kind(
    'cases.0.num_queries', module_cases.mask_downsample, _TENSORS
  ),
  'scheduler': Kind(
    'constructor.use_karras_sigmas', pipeline_cases.scheduler, _TENSORS
  ),
  'portraits': Kind('cases.0.bbox_xywh', pipeline_cases.portraits, _NEXT_TO),
  'crops': Kind('cases.0.expand_radio', pipeline_cases.crops, {}),
  'clip_preprocess': Kind('processor', pipeline_cases.clip_preprocess, _NEXT_TO),
  'speech_features': Kind(
    'feature_extractor', pipeline_cases.speech_features, _NEXT_TO
  ),
  'pipeline': Kind('ip_scale', pipeline_cases.pipeline, _WHOLE),
  'end_to_end': Kind('process_arguments', pipeline_cases.end_to_end, _WHOLE),
  'face_detector': Kind('outputs.raw_p3', face_cases.network, _NEXT_TO),
  'face_detector_wrapper': Kind(
    'network_size_h_w_for_image_h_w', face_cases.wrapper, _NEXT_TO
  ),
  'full_audio_linear': Kind(
    'inputs.audio_embeds.amp', full_size_cases.audio_linear, _NEXT_TO
  ),
  'full_pose_guider': Kind(
    'inputs.conditioning.amp', full_size_cases.pose_guider, _NEXT_TO
  ),
  'full_emo_model': Kind('inputs.emo_prompts.amp', full_size_cases.emo_model, _NEXT_TO),
  'full_whisper': Kind('inputs.input_features.amp', full_size_cases.whisper, _NEXT_TO),
  'full_rife': Kind('inputs.img0.amp', full_size_cases.rife, _NEXT_TO),
  'full_vae': Kind('inputs.latents.amp', full_size_cases.vae, _NEXT_TO),
  'full_clip_vision': Kind(
    'inputs.pixel_values.amp', full_size_cases.clip_vision, _NEXT_TO
  ),
}


def _has(meta: Any, mark: str) -> bool:
  """Checks whether a path of keys exists; a number is a position in a list."""
  for key in mark.split('.'):
    if isinstance(meta, list) and key.isdigit() and int(key) < len(meta):
      meta = meta[int(key)]
    elif isinstance(meta, dict) and key in meta:
      meta = meta[key]
    else:
      return False
  return True


def descriptions(place: pathlib.Path) -> list[pathlib.Path]:
  """Finds the JSON files that describe golden files.

  Args:
    place: one description, with or without its ending, or a folder that is searched
      with all folders below.

  Raises:
    InputError: there are none.
  """
  if place.is_dir():
    found = [
      pathlib.Path(folder, name)
      for folder, _, names in walk(place)
      for name in names
      if name.endswith('.json')
    ]
    if found:
      return sorted(found)
    raise InputError(
      f'{place} has no config.json or other description; give folders that hold golden '
      'files'
    )
  named = place if place.suffix == '.json' else place.with_name(f'{place.name}.json')
  if not named.is_file():
    raise InputError(
      f'{place} is not a folder; give the folders of golden files to verify'
    )
  return [named]


def recognise(path: pathlib.Path) -> str:
  """Finds the kind of golden files by their description.

  Raises:
    InputError: the kind is unknown, or the description is missing or damaged.
  """
  meta = read_json(path)
  found = [name for name, kind in KINDS.items() if _has(meta, kind.mark)]
  if len(found) != 1:
    raise InputError(f'{path} is of unknown kind; known are {", ".join(KINDS)}')
  return found[0]


def load(
  path: pathlib.Path, dtype: jax.typing.DTypeLike | None = None
) -> tuple[str, Golden]:
  """Recognises golden files by their description and reads them.

  Args:
    path: the description.
    dtype: compute dtype, as `Golden` takes it.

  Returns:
    The name of their kind, and the files.

  Raises:
    InputError: the kind is unknown, or a file is missing or damaged.
  """
  name = recognise(path)
  return name, Golden(path, KINDS[name].files, dtype)

"""`python -m convert export`: a model folder back to published files.

The files are those of the reference implementation, diffusers and transformers.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import json
import math
import os
import pathlib
import tempfile
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from safetensors.torch import save_file
import torch
from tqdm import tqdm

from convert import (
  face_detector,
  naming,
  priors,
  published_layouts,
  summary,
  torch_files,
)
from dicetalk_jax import bundle, published_priors
from dicetalk_jax.files import atomic_folder, refuse_existing, require_room

EXAMPLE = """example:
  python -m convert export models/dicetalk exported

Writes what the model has of:
  unet.pth, audio_linear.pth, pose_guider.pth, emo_model.pth
      state dicts, as in the DICE-Talk release; or
  unet.pth, audio2token.pth, audio2bucket.pth
      as in the release of Sonic
  stable-video-diffusion-img2vid-xt/{unet,vae,image_encoder,scheduler}
      diffusers folders; the UNet without adapters
  whisper-tiny                 a transformers folder
  RIFE/flownet.pkl             the frame interpolation
  taesdv.pth                   the decoder of previews
  yoloface_v5m.pt              the face detector, as a state dict without code
  priors/*.npy                 emotion priors
  dicetalk.json or sonic.json  sizes and settings, which the way back needs

The way back, for Sonic without --priors:
  python -m convert dicetalk exported DST \\
      --svd exported/stable-video-diffusion-img2vid-xt \\
      --whisper exported/whisper-tiny --rife exported/RIFE --priors exported/priors \\
      --taesdv exported/taesdv.pth --face_detector exported/yoloface_v5m.pt"""

SVD_FOLDER = 'stable-video-diffusion-img2vid-xt'
WHISPER_FOLDER = 'whisper-tiny'
RIFE_FOLDER = 'RIFE'
PRIORS_FOLDER = 'priors'
ADAPTER = '.processor.'  # in the keys of the UNet's adapters
GROUP = 1 << 28  # bytes of parameters that are in memory at once
ALIGNMENT = 64  # bytes; of the tensors in a temporary file
# The published classes always have 32 groups, and no such entry.
GROUPS = ('norm_num_groups', 32)
SCHEDULER = {
  '_class_name': 'EulerDiscreteScheduler',
  'beta_end': 0.012,
  'beta_schedule': 'scaled_linear',
  'beta_start': 0.00085,
  'interpolation_type': 'linear',
  'num_train_timesteps': 1000,
  'prediction_type': 'v_prediction',
  'sigma_max': 700.0,
  'sigma_min': 0.002,
  'steps_offset': 1,
  'timestep_spacing': 'leading',
  'timestep_type': 'continuous',
  'use_karras_sigmas': True,
}


def run(args: argparse.Namespace) -> int:
  # 1. Refuse what cannot be exported
  known = bundle.require(args.model)
  settings = bundle.settings(args.model)
  release = published_layouts.release_of(settings)
  refuse_existing(args.destination, args.overwrite, release.config)
  found = priors.for_files(args.model)
  for emotion in found:
    bundle.load_prior(args.model, emotion)  # raises if the emotion model misreads it
  written = [name for name in known if name in WRITERS or name in release.files]
  # The decoder goes into the file of Whisper's encoder.
  carried = {published_layouts.WHISPER_DECODER} & known.keys()
  require_room(args.destination, _size(args.model, [*written, *carried]))

  # 2. Write one component after the other
  rows = []
  with atomic_folder(args.destination) as folder:
    bar = tqdm(written, desc='writing', unit='component', disable=None)
    for name in bar:
      bar.set_postfix_str(name)
      rows.append(_write_component(args.model, folder, name, known, release))
    scheduler = SCHEDULER | _sigmas(settings)
    _write_json(folder / SVD_FOLDER / published_layouts.SCHEDULER, scheduler)
    published_priors.write_all(folder / PRIORS_FOLDER, found)
    if found:
      rows.append(priors.Found(found).row())
    own = _own_config(args.model, known, release, settings)
    _write_json(folder / release.config, own)

  # 3. Say what was written, from what, and what was not
  sources = {}
  for name, entry in known.items():
    for file, digest in entry['provenance'].get('files', {}).items():
      sources[f'{file} (source of {name})'] = digest
  files = sorted(
    path
    for path in args.destination.rglob('*')
    if path.suffix in (*torch_files.SUFFIXES, '.npy')
  )
  notes = [
    f'{name}: not written, because the reference implementation has no such file'
    for name in sorted(known.keys() - {*written, *carried})
  ]
  summary.show(rows, sources | torch_files.sha256(files), notes)
  print(f'wrote {args.destination}')
  return 0


def _own_config(
  model: pathlib.Path,
  known: Mapping[str, Any],
  release: published_layouts.Release,
  settings: dict[str, Any],
) -> dict[str, Any]:
  """Makes the configuration that published folders lack: sizes, settings, embedder."""
  without_config = (*release.files, 'flownet', 'taesdv', face_detector.COMPONENT)
  own: dict[str, Any] = {
    'components': {
      name: entry['config'] for name, entry in known.items() if name in without_config
    },
    'settings': settings,
  }
  learned_on = bundle.learned_priors(model)
  if learned_on not in ('', bundle.RELEASED):
    own['priors'] = learned_on
  return own


def _write_component(
  model: pathlib.Path,
  folder: pathlib.Path,
  name: str,
  known: Mapping[str, Any],
  release: published_layouts.Release,
) -> summary.Row:
  """Writes all files of one component, and gives its row of the summary."""
  with tempfile.TemporaryFile(dir=folder.parent) as file:
    config, tensors = _state_dict(model, name, file)
    decoder = published_layouts.WHISPER_DECODER
    if name == 'whisper' and decoder in known:
      config, rest = _state_dict(model, decoder, file)
      tensors |= rest
    if name in WRITERS:
      WRITERS[name](folder, name, config, tensors)
    # A UNet without adapters belongs to no release.
    if name in release.files and config.get('adapters') != 0:
      _save_pickled(tensors, folder / release.files[name])
    return summary.row(name, len(tensors), tensors)


class _Place(NamedTuple):
  """Where a tensor lies in a temporary file."""

  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]


def _state_dict(
  model: pathlib.Path, name: str, file: IO[bytes]
) -> tuple[dict[str, Any], torch_files.StateDict]:
  """Reads configuration and state dict of a component.

  The tensors move to `file` group by group and stay there, mapped into memory.
  """
  places = {}
  config: dict[str, Any] = {}
  for names in _groups(bundle.shapes(model, name)):
    config, params = bundle.load_component(model, name, names=names)
    for key in names:
      value = naming.value_to_torch(key, np.asarray(params.pop(key)))
      offset = file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
      places[naming.torch_name(key)] = _Place(value.dtype, offset, value.shape)
      file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
  file.flush()
  tensors = {}
  for key, place in places.items():
    array = np.memmap(file, place.dtype, 'c', place.offset, place.shape)
    tensors[key] = torch_files.to_torch(array)
  return config, tensors


def _groups(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
  """Splits the names of parameters into groups of about `GROUP` bytes."""
  group: list[str] = []
  size = 0
  for name, x in shapes.items():
    group.append(name)
    size += math.prod(x.shape) * x.dtype.itemsize
    if size >= GROUP:
      yield group
      group = []
      size = 0
  if group:
    yield group


def _write_unet(
  folder: pathlib.Path,
  name: str,
  config: dict[str, Any],
  tensors: torch_files.StateDict,
) -> None:
  """Writes the UNet without adapters, for diffusers and as the base of DICE-Talk's."""
  without_adapters = {key: x for key, x in tensors.items() if ADAPTER not in key}
  _write_folder(folder, name, config, without_adapters)


def _write_folder(
  folder: pathlib.Path,
  name: str,
  config: dict[str, Any],
  tensors: torch_files.StateDict,
) -> None:
  """Writes a diffusers or transformers folder in that of Stable Video Diffusion."""
  place = folder / SVD_FOLDER / name
  stem = 'model' if name == 'image_encoder' else 'diffusion_pytorch_model'
  published = dict(published_layouts.SVD[name])
  for key, value in config.items():
    if key != 'adapters' and (key, value) != GROUPS:
      published[key] = value
  _write_json(place / 'config.json', published)
  save_file(tensors, place / f'{stem}.safetensors', metadata={'format': 'pt'})


def _write_whisper(
  folder: pathlib.Path,
  name: str,
  config: dict[str, Any],
  tensors: torch_files.StateDict,
) -> None:
  """Writes Whisper as a transformers folder.

  If the model has no decoder, the configuration gives it the sizes of the encoder, as
  in all published Whispers.
  """
  place = folder / WHISPER_FOLDER
  decoder = {
    key.replace('encoder', 'decoder'): value
    for key, value in config.items()
    if key.startswith('encoder')
  }
  _write_json(place / 'config.json', published_layouts.WHISPER | decoder | config)
  features = published_layouts.WHISPER_FEATURES | {
    'feature_size': config['num_mel_bins']
  }
  _write_json(place / 'preprocessor_config.json', features)
  prefixed = {
    key if key.startswith('proj_out.') else published_layouts.WHISPER_PREFIX + key: x
    for key, x in tensors.items()
  }
  save_file(prefixed, place / 'model.safetensors', metadata={'format': 'pt'})


def _write_flownet(
  folder: pathlib.Path,
  name: str,
  config: dict[str, Any],
  tensors: torch_files.StateDict,
) -> None:
  """Writes the file of the RIFE release."""
  place = folder / RIFE_FOLDER
  place.mkdir()
  prefixed = {published_layouts.FLOWNET_PREFIX + key: x for key, x in tensors.items()}
  _save_pickled(prefixed, place / published_layouts.FLOWNET)


def _write_taesdv(
  folder: pathlib.Path,
  name: str,
  config: dict[str, Any],
  tensors: torch_files.StateDict,
) -> None:
  """Writes the file of the tiny autoencoder."""
  _save_pickled(tensors, folder / published_layouts.TAESDV)


def _write_face_detector(
  folder: pathlib.Path,
  name: str,
  config: dict[str, Any],
  tensors: torch_files.StateDict,
) -> None:
  """Writes a state dict with the names of the published file, and with its anchors.

  The published file also holds code, which the reference implementation runs.
  """
  grid = torch.tensor(config['anchors'], dtype=torch.float32)
  anchors = {'model.23.anchor_grid': grid.reshape(len(grid), 1, -1, 1, 1, 2)}
  _save_pickled(tensors | anchors, folder / face_detector.FILE)


def _save_pickled(tensors: torch_files.StateDict, path: pathlib.Path) -> None:
  """Saves a state dict through a Python file, whose errors name the system's reason.

  Errors of PyTorch's own files do not.
  """
  with path.open('wb') as file:
    torch.save(tensors, file)


Writer = Callable[[pathlib.Path, str, dict[str, Any], torch_files.StateDict], None]

# What is written in addition to the state dicts of the release.
WRITERS: dict[str, Writer] = {
  'unet': _write_unet,
  'vae': _write_folder,
  'image_encoder': _write_folder,
  'whisper': _write_whisper,
  'flownet': _write_flownet,
  'taesdv': _write_taesdv,
  face_detector.COMPONENT: _write_face_detector,
}


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')


def _sigmas(settings: Mapping[str, Any]) -> dict[str, float]:
  """Gives the entries that the configurations of scheduler and sampler share."""
  sampler = settings.get('sampler', {})
  return {key: sampler[key] for key in ('sigma_min', 'sigma_max') if key in sampler}


def _size(model: pathlib.Path, names: Sequence[str]) -> int:
  """Bytes that an export needs, at most.

  The UNet is written twice, and one component at a time lies in a temporary file.
  """
  sizes = {}
  for name in names:
    shapes = bundle.shapes(model, name)
    sizes[name] = sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes.values())
  return sum(sizes.values()) + sizes.get('unet', 0) + max(sizes.values(), default=0)


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'export',
    help='write PyTorch files',
    description='Writes a model folder as published files, for PyTorch.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'model', metavar='MODEL', type=pathlib.Path, help='the model folder'
  )
  parser.add_argument(
    'destination', metavar='DST', type=pathlib.Path, help='the folder to make'
  )
  parser.add_argument(
    '--overwrite', action='store_true', help='replace an existing exported folder'
  )
  parser.set_defaults(run=run)

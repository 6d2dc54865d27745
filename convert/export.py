"""`python -m convert export`: a model folder back to the files of the original
program, diffusers and transformers.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
import json
import math
import os
import pathlib
import tempfile
from typing import Any, BinaryIO

import jax
import numpy as np
from safetensors.torch import save_file
import torch
from tqdm import tqdm

from convert import naming, priors, published_layouts, summary, torch_files
from dicetalk_jax import bundle, published_priors
from dicetalk_jax.files import atomic_folder, refuse_existing, require_room

EXAMPLE = """example:
  python -m convert export models/dicetalk exported

Writes, of what the model has:
  unet.pth, audio_linear.pth, pose_guider.pth, emo_model.pth            state dicts, as in the DICE-Talk release; or
  unet.pth, audio2token.pth, audio2bucket.pth                           as in that of Sonic
  stable-video-diffusion-img2vid-xt/{unet,vae,image_encoder,scheduler}  diffusers folders; the UNet without adapters
  whisper-tiny                                                          transformers folder
  RIFE/flownet.pkl                                                      the frame interpolation
  priors/*.npy                                                          emotion priors
  dicetalk.json or sonic.json                                           sizes and settings, for the way back
The way back: python -m convert dicetalk exported DST --svd exported/stable-video-diffusion-img2vid-xt
    --whisper exported/whisper-tiny --rife exported/RIFE --priors exported/priors
or python -m convert sonic with the same but for --priors."""

SVD_FOLDER = 'stable-video-diffusion-img2vid-xt'
WHISPER_FOLDER = 'whisper-tiny'
RIFE_FOLDER = 'RIFE'
PRIORS_FOLDER = 'priors'
ADAPTER = '.processor.'
GROUP = 1 << 28  # bytes of parameters that are in memory at once
ALIGNMENT = 64
# of 32 channels groups everywhere in the published classes, which do not name it
GROUPS = 'norm_num_groups'
SCHEDULER = dict(
  _class_name='EulerDiscreteScheduler',
  beta_end=0.012,
  beta_schedule='scaled_linear',
  beta_start=0.00085,
  interpolation_type='linear',
  num_train_timesteps=1000,
  prediction_type='v_prediction',
  sigma_max=700.0,
  sigma_min=0.002,
  steps_offset=1,
  timestep_spacing='leading',
  timestep_type='continuous',
  use_karras_sigmas=True,
)


def run(args: argparse.Namespace) -> int:
  known = bundle.require(args.model)
  settings = bundle.settings(args.model)
  release = published_layouts.release_of(settings)
  refuse_existing(args.destination, args.overwrite, release.config)
  found = priors.for_files(args.model)
  for emotion in found:
    bundle.load_prior(
      args.model, emotion
    )  # refuses one that the emotion model would misread
  written = [name for name in known if name in WRITERS or name in release.files]
  carried = {
    published_layouts.WHISPER_DECODER
  } & known.keys()  # in the file of the encoder
  require_room(args.destination, _size(args.model, [*written, *carried]))
  sized = (*release.files, 'flownet')  # published without a configuration
  own = dict(
    components={
      name: entry['config'] for name, entry in known.items() if name in sized
    },
    settings=settings,
  )
  learned_on = bundle.learned_priors(args.model)
  if learned_on not in ('', bundle.RELEASED):
    own['priors'] = learned_on
  others = known.keys() - {*written, *carried}
  rows, notes = (
    [],
    [f'{name}: the original program has no such file' for name in sorted(others)],
  )
  with atomic_folder(args.destination) as folder:
    for name in (bar := tqdm(written, desc='writing', unit='component', disable=None)):
      bar.set_postfix_str(name)
      with tempfile.TemporaryFile(dir=folder.parent) as file:
        config, tensors = _state_dict(args.model, name, file)
        if name == 'whisper' and published_layouts.WHISPER_DECODER in known:
          config, rest = _state_dict(
            args.model, published_layouts.WHISPER_DECODER, file
          )
          tensors |= rest
        if name in WRITERS:
          WRITERS[name](folder, name, config, tensors)
        if (
          name in release.files and config.get('adapters') != 0
        ):  # the UNet of the release always has them
          _save_pickled(tensors, folder / release.files[name])
        rows.append(summary.row(name, len(tensors), tensors))
        del tensors
    _write_json(
      folder / SVD_FOLDER / published_layouts.SCHEDULER, SCHEDULER | _sigmas(settings)
    )
    published_priors.write_all(folder / PRIORS_FOLDER, found)
    rows += [priors.Found(found).row()] if found else []
    _write_json(folder / release.config, own)
  files = sorted(
    path
    for path in args.destination.rglob('*')
    if path.suffix in (*torch_files.SUFFIXES, '.npy')
  )
  sources = {
    f'{file} (source of {name})': digest
    for name, entry in known.items()
    for file, digest in entry['provenance'].get('files', {}).items()
  }
  summary.show(rows, sources | torch_files.sha256(files), notes)
  print(f'wrote {args.destination}')
  return 0


def _state_dict(
  folder, name: str, file: BinaryIO
) -> tuple[dict[str, Any], torch_files.StateDict]:
  """Configuration and state dict of a component.

  Its tensors move to `file` group by group and stay there, mapped.
  """
  places = {}
  for names in _groups(bundle.shapes(folder, name)):
    config, params = bundle.load_component(folder, name, names=names)
    for key in names:
      value = naming.value_to_torch(key, np.asarray(params.pop(key)))
      places[naming.torch_name(key)] = (
        value.dtype,
        file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR),
        value.shape,
      )
      file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
  file.flush()
  return config, {
    key: torch_files.to_torch(np.memmap(file, dtype, 'c', *where))
    for key, (dtype, *where) in places.items()
  }


def _groups(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
  """Names of parameters, `GROUP` bytes at a time."""
  group, size = [], 0
  for name, x in shapes.items():
    group.append(name)
    size += math.prod(x.shape) * x.dtype.itemsize
    if size >= GROUP:
      yield group
      group, size = [], 0
  if group:
    yield group


def _write_unet(
  folder: pathlib.Path,
  name: str,
  config: dict[str, Any],
  tensors: torch_files.StateDict,
) -> None:
  """The part without adapters, for diffusers and as the base of DICE-Talk's."""
  _write_folder(
    folder, name, config, {key: x for key, x in tensors.items() if ADAPTER not in key}
  )


def _write_folder(
  folder: pathlib.Path,
  name: str,
  config: dict[str, Any],
  tensors: torch_files.StateDict,
) -> None:
  """A diffusers or transformers folder inside that of Stable Video Diffusion."""
  place = folder / SVD_FOLDER / name
  stem = 'model' if name == 'image_encoder' else 'diffusion_pytorch_model'
  _write_json(
    place / 'config.json',
    published_layouts.SVD[name]
    | {
      key: value
      for key, value in config.items()
      if key != 'adapters' and (key, value) != (GROUPS, 32)
    },
  )
  save_file(tensors, place / f'{stem}.safetensors', metadata={'format': 'pt'})


def _write_whisper(
  folder: pathlib.Path,
  name: str,
  config: dict[str, Any],
  tensors: torch_files.StateDict,
) -> None:
  """Where the model has no decoder, its sizes are those of the encoder, as in all
  published Whispers.
  """
  place = folder / WHISPER_FOLDER
  decoder = {
    key.replace('encoder', 'decoder'): value
    for key, value in config.items()
    if key.startswith('encoder')
  }
  _write_json(place / 'config.json', published_layouts.WHISPER | decoder | config)
  _write_json(
    place / 'preprocessor_config.json',
    published_layouts.WHISPER_FEATURES | dict(feature_size=config['num_mel_bins']),
  )
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
  """The file of the RIFE release."""
  (folder / RIFE_FOLDER).mkdir()
  _save_pickled(
    {published_layouts.FLOWNET_PREFIX + key: x for key, x in tensors.items()},
    folder / RIFE_FOLDER / published_layouts.FLOWNET,
  )


def _save_pickled(tensors: torch_files.StateDict, path: pathlib.Path) -> None:
  """Through a file of Python, whose errors say what the system refused; PyTorch's
  own do not.
  """
  with path.open('wb') as file:
    torch.save(tensors, file)


Writer = Callable[[pathlib.Path, str, dict[str, Any], torch_files.StateDict], None]

# What is written besides the state dicts of `layouts.Release.files`.
WRITERS: dict[str, Writer] = {
  'unet': _write_unet,
  'vae': _write_folder,
  'image_encoder': _write_folder,
  'whisper': _write_whisper,
  'flownet': _write_flownet,
}


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')


def _sigmas(settings: dict[str, Any]) -> dict[str, float]:
  """What the scheduler's configuration takes from the sampler's."""
  return {
    key: value
    for key, value in settings.get('sampler', {}).items()
    if key in ('sigma_min', 'sigma_max')
  }


def _size(folder, names) -> int:
  """Bytes of the files, at most: the UNet is written twice, and one component at a
  time is kept aside.
  """
  sizes = {
    name: sum(
      math.prod(x.shape) * x.dtype.itemsize
      for x in bundle.shapes(folder, name).values()
    )
    for name in names
  }
  return sum(sizes.values()) + sizes.get('unet', 0) + max(sizes.values(), default=0)


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'export',
    help='write PyTorch files',
    description='Writes a model folder as the files that the original program, '
    'diffusers and transformers load.',
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
    '--overwrite',
    action='store_true',
    help='replace an exported folder that is there already',
  )
  parser.set_defaults(run=run)

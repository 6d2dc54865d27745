"""`python -m convert export`: a model folder back to the files of the original program, diffusers and transformers."""

import argparse
from collections.abc import Callable
import json
import math
import pathlib
from typing import Any

import numpy as np
from safetensors.torch import save_file
import torch
from tqdm import tqdm

from convert import layouts, naming, published, report
from convert.aside import folder_aside, refuse_existing, require_room
from dicetalk_jax import bundle, prior_file

EXAMPLE = """example:
  python -m convert export models/dicetalk exported

Writes, of what the model has:
  unet.pth, audio_linear.pth, pose_guider.pth, emo_model.pth            state dicts, as in the DICE-Talk release; or
  unet.pth, audio2token.pth, audio2bucket.pth                           as in that of Sonic
  stable-video-diffusion-img2vid-xt/{unet,vae,image_encoder,scheduler}  diffusers folders; the UNet without adapters
  whisper-tiny                                                          transformers folder; the encoder only
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
GROUPS = 'norm_num_groups'  # of 32 channels groups everywhere in the published classes, which do not name it
SCHEDULER = dict(
    _class_name='EulerDiscreteScheduler', beta_end=0.012, beta_schedule='scaled_linear', beta_start=0.00085,
    interpolation_type='linear', num_train_timesteps=1000, prediction_type='v_prediction', sigma_max=700.0,
    sigma_min=0.002, steps_offset=1, timestep_spacing='leading', timestep_type='continuous', use_karras_sigmas=True)


def run(args: argparse.Namespace) -> int:
  known = bundle.require(args.model)
  settings = bundle.settings(args.model)
  release = layouts.release_of(settings)
  refuse_existing(args.destination, args.overwrite, release.config)
  written = [name for name in known if name in WRITERS or name in release.files]
  require_room(args.destination, sum(_size(args.model, name) for name in written))
  sized = (*release.files, 'flownet')      # published without a configuration
  own = dict(components={name: entry['config'] for name, entry in known.items() if name in sized}, settings=settings)
  rows, notes = [], [f'{name}: the original program has no such file' for name in known if name not in written]
  with folder_aside(args.destination) as folder:
    for name in (bar := tqdm(written, desc='writing', unit='component', disable=None)):
      bar.set_postfix_str(name)
      config, tensors = _state_dict(args.model, name)
      if name in WRITERS:
        WRITERS[name](folder, name, config, tensors)
      if name in release.files and config.get('adapters') != 0:      # the UNet of the release always has them
        torch.save(tensors, folder / release.files[name])
      rows.append(report.row(name, len(tensors), tensors))
      del tensors
    _write_json(folder / SVD_FOLDER / layouts.SCHEDULER, SCHEDULER | _sigmas(settings))
    prior_file.write_all(folder / PRIORS_FOLDER, bundle.load_priors(args.model))
    _write_json(folder / release.config, own)
  files = sorted(path for path in args.destination.rglob('*') if path.suffix in published.SUFFIXES)
  report.show(rows, published.sha256(files), notes)
  print(f'wrote {args.destination}')
  return 0


def _state_dict(folder, name: str) -> tuple[dict[str, Any], published.StateDict]:
  """Configuration and state dict of a component; our arrays are let go one by one."""
  config, params = bundle.load_component(folder, name)
  return config, {naming.torch_name(key): published.to_torch(np.array(naming.value_to_torch(
      key, np.asarray(params.pop(key))), order='C')) for key in list(params)}


def _write_unet(folder: pathlib.Path, name: str, config: dict[str, Any], tensors: published.StateDict) -> None:
  """The part without adapters, for diffusers and as the base of DICE-Talk's."""
  _write_folder(folder, name, config, {key: x for key, x in tensors.items() if ADAPTER not in key})


def _write_folder(folder: pathlib.Path, name: str, config: dict[str, Any], tensors: published.StateDict) -> None:
  """A diffusers or transformers folder inside that of Stable Video Diffusion."""
  place = folder / SVD_FOLDER / name
  stem = 'model' if name == 'image_encoder' else 'diffusion_pytorch_model'
  _write_json(place / 'config.json', layouts.SVD[name] | {
      key: value for key, value in config.items() if key != 'adapters' and (key, value) != (GROUPS, 32)})
  save_file(tensors, place / f'{stem}.safetensors', metadata={'format': 'pt'})


def _write_whisper(folder: pathlib.Path, name: str, config: dict[str, Any], tensors: published.StateDict) -> None:
  """The sizes of the decoder, which is absent, are those of the encoder, as in all published Whispers."""
  place = folder / WHISPER_FOLDER
  decoder = {key.replace('encoder', 'decoder'): value for key, value in config.items() if key.startswith('encoder')}
  _write_json(place / 'config.json', layouts.WHISPER | decoder | config)
  _write_json(place / 'preprocessor_config.json', layouts.WHISPER_FEATURES | dict(feature_size=config['num_mel_bins']))
  save_file({layouts.WHISPER_PREFIX + key: x for key, x in tensors.items()}, place / 'model.safetensors',
            metadata={'format': 'pt'})


def _write_flownet(folder: pathlib.Path, name: str, config: dict[str, Any], tensors: published.StateDict) -> None:
  """The file of the RIFE release."""
  (folder / RIFE_FOLDER).mkdir()
  torch.save({layouts.FLOWNET_PREFIX + key: x for key, x in tensors.items()}, folder / RIFE_FOLDER / layouts.FLOWNET)


Writer = Callable[[pathlib.Path, str, dict[str, Any], published.StateDict], None]

# What is written besides the state dicts of `layouts.Release.files`.
WRITERS: dict[str, Writer] = {
    'unet': _write_unet, 'vae': _write_folder, 'image_encoder': _write_folder, 'whisper': _write_whisper,
    'flownet': _write_flownet}


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')


def _sigmas(settings: dict[str, Any]) -> dict[str, float]:
  """What the scheduler's configuration takes from the sampler's."""
  return {key: value for key, value in settings.get('sampler', {}).items() if key in ('sigma_min', 'sigma_max')}


def _size(folder, name: str) -> int:
  """Bytes of the files of a component, at most."""
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in bundle.shapes(folder, name).values())
  return size * (2 if name == 'unet' else 1)


def add_parser(commands) -> None:
  parser = commands.add_parser(
      'export', help='write PyTorch files', description='Writes a model folder as the files that the original program, '
      'diffusers and transformers load.', epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('model', metavar='MODEL', type=pathlib.Path, help='the model folder')
  parser.add_argument('destination', metavar='DST', type=pathlib.Path, help='the folder to make')
  parser.add_argument('--overwrite', action='store_true', help='replace an exported folder that is there already')
  parser.set_defaults(run=run)

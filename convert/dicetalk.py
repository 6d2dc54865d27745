"""`python -m convert dicetalk`: the DICE-Talk release to one model folder."""

import argparse
import dataclasses
import pathlib
import re
from typing import Any

import jax
import numpy as np

from convert import model_folder, naming, priors, release_folder, svd, torch_files
from convert.component_check import Part, model
from dicetalk_jax import bundle
from dicetalk_jax.models import parameters, registry

EXAMPLE = """example:
  python -m convert dicetalk checkpoints/DICE-Talk models/dicetalk \\
      --svd checkpoints/stable-video-diffusion-img2vid-xt --whisper checkpoints/whisper-tiny \\
      --rife checkpoints/RIFE --priors examples/emo

SRC holds unet.pth, audio_linear.pth, pose_guider.pth and emo_model.pth. As in the original program, unet.pth is laid
over the UNet of --svd (whose adapters start as copies of its own keys and values), emo_model.pth over initial values;
what they lack or have too much is reported. All other files must fit exactly."""

# Options that may be left out, and what is missing then.
OPTIONS = dict(
  svd='vae, image_encoder', whisper='whisper', rife='flownet', priors='emotion priors'
)


def run(args: argparse.Namespace) -> int:
  model_folder.refuse(args)
  own = release_folder.own_config(args.source, 'dicetalk')
  base = svd.parts(args.svd) if args.svd else []
  parts = [
    _unet(args.source, own, base),
    *(part for part in base if part.name != 'unet'),
  ]
  parts += [
    release_folder.part(args.source, 'dicetalk', name, own)
    for name in ('audio_linear', 'pose_guider')
  ]
  parts += [_emotion_model(args.source, own), *release_folder.companions(args, own)]
  settings = own.get('settings') or (svd.settings(args.svd) if args.svd else {})
  width = next(part.config['prior_dim'] for part in parts if part.name == 'emo_model')
  notes = release_folder.not_given(args, OPTIONS)
  found = priors.read(args.priors, width) if args.priors else None
  learned_on = own.get('priors', bundle.RELEASED)
  model_folder.model_folder(args, parts, settings, found, notes, learned_on)
  return 0


def _unet(folder: pathlib.Path, own: dict[str, Any], base: list[Part]) -> Part:
  """`unet.pth` over the base with adapters."""
  part = release_folder.part(folder, 'dicetalk', 'unet', own, strict=False)
  if not base:
    return part
  below = next(x for x in base if x.name == 'unet')
  part = dataclasses.replace(
    part,
    config=below.config | dict(adapters=part.config['adapters']),
    files=below.files + part.files,
    licence=f'{part.licence}; {below.licence}',
  )
  adapters = {
    key: below.tensors[source]
    for key in map(naming.torch_name, model(part)[1])
    if (source := re.sub(r'processor\.to_([kv])_ip\.\d+', r'to_\1', key)) != key
    and source in below.tensors
  }
  lacking = {
    where: [key for key in tensors if key not in part.tensors]
    for where, tensors in (
      ('the base', below.tensors),
      ("copies of the base's keys and values", adapters),
    )
  }
  notes = [
    f'unet: not in unet.pth, taken from {where}: {len(keys)} ({", ".join(keys)})'
    for where, keys in lacking.items()
    if keys
  ]
  return dataclasses.replace(
    part, tensors=adapters | below.tensors | part.tensors, notes=tuple(notes)
  )


def _emotion_model(folder: pathlib.Path, own: dict[str, Any]) -> Part:
  """`emo_model.pth` over initial values."""
  part = release_folder.part(folder, 'dicetalk', 'emo_model', own, strict=False)
  lacking = [
    name for name in model(part)[1] if naming.torch_name(name) not in part.tensors
  ]
  if not lacking:
    return part
  drawn = parameters.init_params(
    registry.builder(part.name, part.config), jax.random.key(0), names=lacking
  )
  initial = {
    key: torch_files.to_torch(np.array(x)) for key, x in naming.to_torch(drawn).items()
  }
  note = f'emo_model: not in emo_model.pth, drawn at random: {len(initial)} ({", ".join(initial)})'
  return dataclasses.replace(part, tensors=initial | part.tensors, notes=(note,))


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'dicetalk',
    help='convert the DICE-Talk release',
    description='Converts the DICE-Talk release and what it builds '
    'on to one model folder.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  release_folder.add_arguments(parser)
  parser.add_argument(
    '--priors',
    metavar='PATH',
    type=pathlib.Path,
    nargs='+',
    default=[],
    help='emotion priors: .npy files, or folders of them',
  )
  parser.set_defaults(run=run)

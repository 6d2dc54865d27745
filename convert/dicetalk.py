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
      --svd checkpoints/stable-video-diffusion-img2vid-xt \\
      --whisper checkpoints/whisper-tiny \\
      --rife checkpoints/RIFE --priors examples/emo

SRC holds unet.pth, audio_linear.pth, pose_guider.pth and emo_model.pth. As in the
reference implementation, unet.pth replaces values of the UNet of --svd (whose adapters
start as copies of its own keys and values), and emo_model.pth replaces initial values.
The summary lists missing and surplus tensors. All other files must fit exactly."""

# Options that may be left out, and what the model lacks then.
OPTIONS = {
  'svd': 'vae, image_encoder',
  'whisper': 'whisper',
  'rife': 'flownet',
  'taesdv': 'taesdv (no previews)',
  'priors': 'emotion priors',
  'face_detector': 'face_detector (MTCNN finds faces instead)',
}
_ADAPTER = re.compile(r'processor\.to_([kv])_ip\.\d+')


def run(args: argparse.Namespace) -> int:
  model_folder.refuse(args)
  own = release_folder.own_config(args.source, 'dicetalk')
  base = svd.parts(args.svd) if args.svd else []
  emotion_model = _emotion_model(args.source, own)
  parts = [
    _unet(args.source, own, base),
    *(part for part in base if part.name != 'unet'),
    release_folder.part(args.source, 'dicetalk', 'audio_linear', own),
    release_folder.part(args.source, 'dicetalk', 'pose_guider', own),
    emotion_model,
    *release_folder.companions(args, own),
  ]
  settings = own.get('settings') or (svd.settings(args.svd) if args.svd else {})
  found = None
  if args.priors:
    found = priors.read(args.priors, emotion_model.config['prior_dim'])
  model_folder.model_folder(
    args,
    parts,
    settings,
    found,
    release_folder.missing_options(args, OPTIONS),
    own.get('priors', bundle.RELEASED),
  )
  return 0


def _unet(folder: pathlib.Path, own: dict[str, Any], base: list[Part]) -> Part:
  """Reads `unet.pth`, over the UNet of `base` with adapters.

  The values of `unet.pth` come first, then those of the base. Adapters that are in
  neither start as copies of the base's keys and values.
  """
  part = release_folder.part(folder, 'dicetalk', 'unet', own, strict=False)
  if not base:
    return part
  below = next(x for x in base if x.name == 'unet')
  part = dataclasses.replace(
    part,
    config=below.config | {'adapters': part.config['adapters']},
    files=below.files + part.files,
    licence=f'{part.licence}; {below.licence}',
  )
  copies = _adapter_copies(part, below.tensors)
  notes = [*below.notes, *part.notes]
  for origin, tensors in (
    ('the base', below.tensors),
    ("copies of the base's keys and values", copies),
  ):
    taken = [key for key in tensors if key not in part.tensors]
    if taken:
      notes.append(
        f'unet: not in unet.pth, taken from {origin}: {len(taken)} ({", ".join(taken)})'
      )
  return dataclasses.replace(
    part, tensors=copies | below.tensors | part.tensors, notes=tuple(notes)
  )


def _adapter_copies(part: Part, base: torch_files.StateDict) -> torch_files.StateDict:
  """Gives every adapter the keys or values of its layer in the base."""
  copies = {}
  for name in model(part)[1]:
    key = naming.torch_name(name)
    source = _ADAPTER.sub(r'to_\1', key)
    if source != key and source in base:
      copies[key] = base[source]
  return copies


def _emotion_model(folder: pathlib.Path, own: dict[str, Any]) -> Part:
  """Reads `emo_model.pth`, over random initial values."""
  part = release_folder.part(folder, 'dicetalk', 'emo_model', own, strict=False)
  lacking = [
    name for name in model(part)[1] if naming.torch_name(name) not in part.tensors
  ]
  if not lacking:
    return part
  drawn = parameters.init_params(
    registry.builder(part.name, part.config), jax.random.key(0)
  )
  random = naming.to_torch({name: drawn[name] for name in lacking})
  initial = {key: torch_files.to_torch(np.array(x)) for key, x in random.items()}
  note = (
    f'emo_model: not in emo_model.pth, drawn at random: {len(initial)} '
    f'({", ".join(initial)})'
  )
  return dataclasses.replace(
    part, tensors=initial | part.tensors, notes=(*part.notes, note)
  )


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'dicetalk',
    help='convert the DICE-Talk release',
    description='Converts the DICE-Talk release, and what it builds on, to one model '
    'folder.',
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

"""`python -m convert dicetalk`: the DICE-Talk release to one model folder."""

import argparse
import dataclasses
import pathlib
import re
from typing import Any

import jax
import numpy as np

from convert import layouts, naming, priors, published, svd, whisper, write
from convert.part import Part, fit, model
from dicetalk_jax.errors import InputError
from dicetalk_jax.models import core, registry

EXAMPLE = """example:
  python -m convert dicetalk checkpoints/DICE-Talk models/dicetalk \\
      --svd checkpoints/stable-video-diffusion-img2vid-xt --whisper checkpoints/whisper-tiny \\
      --rife checkpoints/RIFE --priors examples/emo

SRC holds unet.pth, audio_linear.pth, pose_guider.pth and emo_model.pth. As in the original program, unet.pth is laid
over the UNet of --svd (whose adapters start as copies of its own keys and values), emo_model.pth over initial values;
what they lack or have too much is reported. All other files must fit exactly."""

# Options that may be left out, and what is missing then.
OPTIONS = dict(svd='vae, image_encoder', whisper='whisper', rife='flownet', priors='emotion priors')


def run(args: argparse.Namespace) -> int:
  write.refuse(args)
  own = _own_config(args.source)
  base = svd.parts(args.svd) if args.svd else []
  parts = [_unet(args.source, own, base), *(part for part in base if part.name != 'unet')]
  parts += [_file(args.source, name, own) for name in ('audio_linear', 'pose_guider')]
  parts += [_emotion_model(args.source, own)]
  parts += whisper.parts(args.whisper) if args.whisper else []
  notes = [f'{what}: not converted; add --{option}' for option, what in OPTIONS.items() if not getattr(args, option)]
  parts += [_flownet(args.rife, own)] if args.rife else []
  settings = own.get('settings') or (svd.settings(args.svd) if args.svd else {})
  width = next(part.config['prior_dim'] for part in parts if part.name == 'emo_model')
  write.model_folder(args, parts, settings, priors.read(args.priors, width) if args.priors else None, notes)
  return 0


def _own_config(folder: pathlib.Path) -> dict[str, Any]:
  """Sizes and settings beside an exported model; the published folder has none and the published sizes."""
  if not folder.is_dir():
    raise InputError(f'{folder} is not a folder; give the folder of the release that holds unet.pth')
  path = folder / layouts.DICETALK_CONFIG
  own = published.read_json(path) if path.exists() else {}
  components = own.setdefault('components', {})
  if not isinstance(components, dict) or not all(isinstance(x, dict) for x in components.values()):
    raise InputError(f'{path} is damaged; copy the exported folder again, or remove it for the published sizes')
  return own


def _file(folder: pathlib.Path, name: str, own: dict[str, Any], **options) -> Part:
  config = own['components'].get(name)
  part = layouts.file_part(name, folder / layouts.DICETALK[name], 'dicetalk', config, **options)
  fit(part)     # before another file fills its gaps
  return part


def _unet(folder: pathlib.Path, own: dict[str, Any], base: list[Part]) -> Part:
  """`unet.pth` over the base with adapters."""
  part = _file(folder, 'unet', own, strict=False)
  if not base:
    return part
  below = next(x for x in base if x.name == 'unet')
  part = dataclasses.replace(
      part, config=below.config | dict(adapters=part.config['adapters']), files=below.files + part.files,
      licence=f'{part.licence}; {below.licence}')
  adapters = {key: below.tensors[source] for key in map(naming.torch_name, model(part)[1])
              if (source := re.sub(r'processor\.to_([kv])_ip\.\d+', r'to_\1', key)) != key
              and source in below.tensors}
  lacking = {where: [key for key in tensors if key not in part.tensors]
             for where, tensors in (('the base', below.tensors), ("copies of the base's keys and values", adapters))}
  notes = [f'unet: not in unet.pth, taken from {where}: {len(keys)} ({", ".join(keys)})'
           for where, keys in lacking.items() if keys]
  return dataclasses.replace(part, tensors=adapters | below.tensors | part.tensors, notes=tuple(notes))


def _emotion_model(folder: pathlib.Path, own: dict[str, Any]) -> Part:
  """`emo_model.pth` over initial values."""
  part = _file(folder, 'emo_model', own, strict=False)
  lacking = [name for name in model(part)[1] if naming.torch_name(name) not in part.tensors]
  if not lacking:
    return part
  drawn = core.init_params(registry.builder(part.name, part.config), jax.random.key(0), names=lacking)
  initial = {key: published.to_torch(np.array(x)) for key, x in naming.to_torch(drawn).items()}
  note = f'emo_model: not in emo_model.pth, drawn at random: {len(initial)} ({", ".join(initial)})'
  return dataclasses.replace(part, tensors=initial | part.tensors, notes=(note,))


def _flownet(path: pathlib.Path, own: dict[str, Any]) -> Part:
  """Only keys with the prefix belong to the network, as in the original program."""
  config = own['components'].get('flownet')
  part = layouts.file_part('flownet', path / layouts.FLOWNET if path.is_dir() else path, 'rife', config)
  inside = {key: x for key, x in part.tensors.items() if key.startswith(layouts.FLOWNET_PREFIX)}
  others = tuple(key for key in part.tensors if key not in inside)
  return dataclasses.replace(part, tensors=layouts.without_prefix(inside, layouts.FLOWNET_PREFIX), aside=others)


def add_parser(commands) -> None:
  parser = commands.add_parser(
      'dicetalk', help='convert the DICE-Talk release', description='Converts the DICE-Talk release and what it builds '
      'on to one model folder.', epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
  write.add_arguments(parser)
  parser.add_argument('--svd', metavar='DIR', type=pathlib.Path, help='folder of Stable Video Diffusion XT')
  parser.add_argument('--whisper', metavar='DIR', type=pathlib.Path, help='folder of whisper-tiny')
  parser.add_argument('--rife', metavar='PATH', type=pathlib.Path, help='flownet.pkl, or the folder that holds it')
  parser.add_argument('--priors', metavar='PATH', type=pathlib.Path, nargs='+', default=[],
                      help='emotion priors: .npy files, or folders of them')
  parser.set_defaults(run=run)

"""Shared parts of the conversions of DICE-Talk and Sonic.

Both read the files of a release, and the published folders that it builds on.
"""

import argparse
from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from convert import face_detector, model_folder, published_layouts, torch_files, whisper
from convert.component_check import Part, fit
from dicetalk_jax.detect.yolo_face import COMPONENT
from dicetalk_jax.errors import InputError


def own_config(folder: pathlib.Path, kind: str) -> dict[str, Any]:
  """Reads sizes, settings and embedder from the configuration of an exported model.

  A published folder has no such file: then the published sizes hold.

  Args:
    folder: of the release.
    kind: a key of `published_layouts.RELEASES`.

  Raises:
    InputError: there is no such folder, or its configuration is damaged.
  """
  if not folder.is_dir():
    raise InputError(
      f'{folder} is not a folder; give the folder of the release that holds unet.pth'
    )
  path = folder / published_layouts.RELEASES[kind].config
  own = torch_files.read_json(path) if path.exists() else {}
  own.setdefault('components', {})
  if not _is_well_formed(own):
    raise InputError(
      f'{path} is damaged; copy the exported folder again, or remove the file for the '
      'published sizes'
    )
  return own


def _is_well_formed(own: Mapping[str, Any]) -> bool:
  components = own['components']
  return (
    isinstance(components, dict)
    and all(isinstance(config, dict) for config in components.values())
    and isinstance(own.get('settings', {}), dict)
    and isinstance(own.get('priors', ''), str)
  )


def part(
  folder: pathlib.Path, kind: str, name: str, own: Mapping[str, Any], **options
) -> Part:
  """Reads a component from its file.

  Args:
    folder: of the release.
    kind: a key of `published_layouts.RELEASES`.
    name: of the component.
    own: the result of `own_config`.
    **options: further attributes of `Part`.

  Raises:
    WeightsError: the file belongs to another component.
  """
  release = published_layouts.RELEASES[kind]
  config = {**release.sizes.get(name, {}), **own['components'].get(name, {})}
  out = published_layouts.file_part(
    name, folder / release.files[name], kind, config, **options
  )
  fit(out)  # now, because later other tensors fill its gaps
  return out


def companions(args: argparse.Namespace, own: Mapping[str, Any]) -> list[Part]:
  """Reads Whisper, RIFE, TAESDV and the face detector, if they are given."""
  parts = []
  if args.whisper:
    parts += whisper.parts(args.whisper)
  if args.rife:
    parts.append(_flownet(args.rife, own))
  if args.taesdv:
    parts.append(_taesdv(args.taesdv, own))
  if args.face_detector:
    sizes = own['components'].get(COMPONENT)
    parts.append(face_detector.part(args.face_detector, sizes))
  return parts


def _flownet(path: pathlib.Path, own: Mapping[str, Any]) -> Part:
  """Reads RIFE. If keys have the prefix, only these belong to the network."""
  if path.is_dir():
    path = path / published_layouts.FLOWNET
  prefix = published_layouts.FLOWNET_PREFIX
  out = published_layouts.file_part(
    'flownet', path, 'rife', own['components'].get('flownet'), prefix
  )
  network = {key: x for key, x in out.tensors.items() if key.startswith(prefix)}
  if not network:
    return out
  return dataclasses.replace(
    out,
    tensors=published_layouts.without_prefix(network, prefix),
    ignored=tuple(key for key in out.tensors if key not in network),
  )


def _taesdv(path: pathlib.Path, own: Mapping[str, Any]) -> Part:
  """Reads the tiny autoencoder."""
  if path.is_dir():
    path = path / published_layouts.TAESDV
  sizes = own['components'].get('taesdv')
  return published_layouts.file_part('taesdv', path, 'taesdv', sizes)


def missing_options(args: argparse.Namespace, options: Mapping[str, str]) -> list[str]:
  """Makes a note for every option that was left out.

  Args:
    args: of the command.
    options: what the model lacks without the option, by its name.
  """
  return [
    f'{lacking}: not converted; add --{option}'
    for option, lacking in options.items()
    if not getattr(args, option)
  ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments of both commands."""
  model_folder.add_arguments(parser)
  parser.add_argument(
    '--svd',
    metavar='DIR',
    type=pathlib.Path,
    help='folder of Stable Video Diffusion XT',
  )
  parser.add_argument(
    '--whisper', metavar='DIR', type=pathlib.Path, help='folder of whisper-tiny'
  )
  parser.add_argument(
    '--rife',
    metavar='PATH',
    type=pathlib.Path,
    help='flownet.pkl, or the folder that holds it',
  )
  parser.add_argument(
    '--taesdv',
    metavar='PATH',
    type=pathlib.Path,
    help='taesdv.pth or .safetensors, or the folder that holds taesdv.pth: the decoder '
    'of previews',
  )
  parser.add_argument(
    '--face_detector',
    metavar='PATH',
    type=pathlib.Path,
    help='yoloface_v5m.pt, the face detector of the reference implementation; without '
    'it, MTCNN finds the face',
  )

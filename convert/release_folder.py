"""What the conversions of DICE-Talk and Sonic share: files of a release, and the
published folders beneath it.
"""

import argparse
from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from convert import model_folder, published_layouts, torch_files, whisper
from convert.component_check import Part, fit
from dicetalk_jax.errors import InputError


def own_config(folder: pathlib.Path, kind: str) -> dict[str, Any]:
  """Sizes, settings and embedder beside an exported model; the published folder has
  none and the published sizes.
  """
  if not folder.is_dir():
    raise InputError(
      f'{folder} is not a folder; give the folder of the release that holds unet.pth'
    )
  path = folder / published_layouts.RELEASES[kind].config
  own = torch_files.read_json(path) if path.exists() else {}
  components, settings = own.setdefault('components', {}), own.get('settings', {})
  plain = isinstance(components, dict) and all(
    isinstance(x, dict) for x in (settings, *components.values())
  )
  plain = plain and isinstance(own.get('priors', ''), str)
  if not plain:
    raise InputError(
      f'{path} is damaged; copy the exported folder again, or remove it for the '
      'published sizes'
    )
  return own


def part(
  folder: pathlib.Path, kind: str, name: str, own: Mapping[str, Any], **options
) -> Part:
  """A component from its file; `options` are those of `Part`.

  Raises:
    WeightsError: the file is of something else.
  """
  release = published_layouts.RELEASES[kind]
  config = {**release.sizes.get(name, {}), **own['components'].get(name, {})}
  out = published_layouts.file_part(
    name, folder / release.files[name], kind, config, **options
  )
  fit(out)  # before another file fills its gaps
  return out


def companions(args: argparse.Namespace, own: Mapping[str, Any]) -> list[Part]:
  """Whisper and RIFE, if they are given."""
  parts = whisper.parts(args.whisper) if args.whisper else []
  return parts + ([_flownet(args.rife, own)] if args.rife else [])


def _flownet(path: pathlib.Path, own: Mapping[str, Any]) -> Part:
  """Only keys with the prefix belong to the network, as in the original program."""
  config = own['components'].get('flownet')
  out = published_layouts.file_part(
    'flownet',
    path / published_layouts.FLOWNET if path.is_dir() else path,
    'rife',
    config,
  )
  inside = {
    key: x
    for key, x in out.tensors.items()
    if key.startswith(published_layouts.FLOWNET_PREFIX)
  }
  others = tuple(key for key in out.tensors if key not in inside)
  return dataclasses.replace(
    out,
    tensors=published_layouts.without_prefix(inside, published_layouts.FLOWNET_PREFIX),
    aside=others,
  )


def not_given(args: argparse.Namespace, options: Mapping[str, str]) -> list[str]:
  """Notes on options that were left out; `options` tells what is missing then."""
  return [
    f'{what}: not converted; add --{option}'
    for option, what in options.items()
    if not getattr(args, option)
  ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What both commands take."""
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

"""`python -m convert whisper`: Whisper to a model folder."""

import argparse
import dataclasses
import pathlib
import re

from convert import model_folder, published_layouts, torch_files
from convert.component_check import Part

EXAMPLE = """example:
  python -m convert whisper downloads/whisper-tiny models/whisper

Reads config.json and model.safetensors or pytorch_model.bin. The encoder becomes the
component whisper. The decoder, which nothing here computes, is kept as whisper_decoder
under its published names, so that an export is complete again.
For DICE-Talk use `python -m convert dicetalk ... --whisper`."""


def parts(folder: pathlib.Path) -> list[Part]:
  """Reads the encoder, and the decoder if there is one.

  Published files were saved from two classes: one with, one without the prefix.
  """
  prefix = published_layouts.WHISPER_PREFIX
  whole = published_layouts.folder_part('whisper', folder, 'whisper', prefix)
  tensors = published_layouts.without_prefix(whole.tensors, prefix)
  encoder: torch_files.StateDict = {}
  rest: torch_files.StateDict = {}
  for key, x in tensors.items():
    group = rest if re.match(published_layouts.WHISPER_UNUSED, key) else encoder
    group[key] = x
  found = [dataclasses.replace(whole, tensors=encoder)]
  if rest:
    name = published_layouts.WHISPER_DECODER
    found.append(dataclasses.replace(whole, name=name, tensors=rest, notes=()))
  return found


def run(args: argparse.Namespace) -> int:
  model_folder.refuse(args)
  model_folder.model_folder(args, parts(args.source))
  return 0


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'whisper',
    help='convert Whisper',
    description='Converts the transformers folder of whisper-tiny.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  model_folder.add_arguments(parser)
  parser.set_defaults(run=run)

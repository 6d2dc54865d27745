"""`python -m convert whisper`: Whisper's encoder to a model folder."""

import argparse
import dataclasses
import pathlib

from convert import layouts, write
from convert.part import Part

EXAMPLE = """example:
  python -m convert whisper downloads/whisper-tiny models/whisper

Reads config.json and model.safetensors or pytorch_model.bin. Only the encoder is kept; the decoder counts as left over.
The result is one component: for DICE-Talk use `python -m convert dicetalk ... --whisper`."""


def part(folder: pathlib.Path) -> Part:
  """The encoder; published files were saved from two classes, with and without the prefix."""
  whole = layouts.folder_part('whisper', folder, 'whisper')
  tensors = layouts.without_prefix(whole.tensors, layouts.WHISPER_PREFIX)
  return dataclasses.replace(whole, tensors=tensors, unused=layouts.WHISPER_UNUSED)


def run(args: argparse.Namespace) -> int:
  write.refuse(args)
  write.model_folder(args, [part(args.source)])
  return 0


def add_parser(commands) -> None:
  parser = commands.add_parser(
      'whisper', help="convert Whisper's encoder", description='Converts the transformers folder of whisper-tiny.',
      epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter)
  write.add_arguments(parser)
  parser.set_defaults(run=run)

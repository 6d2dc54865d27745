"""`python -m convert whisper`: Whisper to a model folder."""

import argparse
import dataclasses
import pathlib
import re

from convert import layouts, write
from convert.part import Part

EXAMPLE = """example:
  python -m convert whisper downloads/whisper-tiny models/whisper

Reads config.json and model.safetensors or pytorch_model.bin. The encoder becomes the component whisper. The decoder,
which nothing here computes, is kept as whisper_decoder by its published names, so that the export is whole again.
For DICE-Talk use `python -m convert dicetalk ... --whisper`."""


def parts(folder: pathlib.Path) -> list[Part]:
  """Encoder, and decoder if there is one; published files were saved from two
  classes, with and without the prefix.
  """
  whole = layouts.folder_part('whisper', folder, 'whisper')
  tensors = layouts.without_prefix(whole.tensors, layouts.WHISPER_PREFIX)
  rest = {key: x for key, x in tensors.items() if re.match(layouts.WHISPER_UNUSED, key)}
  encoder = dataclasses.replace(
    whole, tensors={key: x for key, x in tensors.items() if key not in rest}
  )
  return (
    [encoder, dataclasses.replace(whole, name=layouts.WHISPER_DECODER, tensors=rest)]
    if rest
    else [encoder]
  )


def run(args: argparse.Namespace) -> int:
  write.refuse(args)
  write.model_folder(args, parts(args.source))
  return 0


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'whisper',
    help='convert Whisper',
    description='Converts the transformers folder of whisper-tiny.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  write.add_arguments(parser)
  parser.set_defaults(run=run)

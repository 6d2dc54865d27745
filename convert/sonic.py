"""`python -m convert sonic`: the release of Sonic, DICE-Talk's predecessor, to one
model folder.
"""

import argparse
from typing import Any

from convert import model_folder, published_layouts, release_folder, svd

EXAMPLE = """example:
  python -m convert sonic checkpoints/Sonic models/sonic \\
      --svd checkpoints/stable-video-diffusion-img2vid-xt --whisper checkpoints/whisper-tiny \\
      --rife checkpoints/RIFE

SRC holds unet.pth, audio2token.pth and audio2bucket.pth. All files must fit exactly: unet.pth is a whole UNet, so of
--svd only the autoencoder, the image encoder and the scheduler are read. The result makes videos without --emotion."""

OPTIONS = dict(svd='vae, image_encoder', whisper='whisper', rife='flownet')

# Where the published program differs from DICE-Talk's.
SETTINGS = dict(kind='sonic', decode_chunk=8, upcast_vae=False)
SAMPLER = dict(g_image=2.0, g_condition=7.5, padding=False)


def run(args: argparse.Namespace) -> int:
  model_folder.refuse(args)
  own = release_folder.own_config(args.source, 'sonic')
  parts = [
    release_folder.part(args.source, 'sonic', name, own)
    for name in published_layouts.SONIC
  ]
  parts += svd.parts(args.svd, ('vae', 'image_encoder')) if args.svd else []
  parts += release_folder.companions(args, own)
  model_folder.model_folder(
    args, parts, _settings(args, own), notes=release_folder.not_given(args, OPTIONS)
  )
  return 0


def _settings(args: argparse.Namespace, own: dict[str, Any]) -> dict[str, Any]:
  """Those of an exported model, else the published ones."""
  if own.get('settings'):
    return own['settings'] | dict(kind='sonic')
  schedule = svd.settings(args.svd)['sampler'] if args.svd else {}
  return SETTINGS | dict(sampler=SAMPLER | schedule)


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'sonic',
    help='convert the Sonic release',
    description='Converts the release of Sonic and what it builds on to '
    'one model folder.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  release_folder.add_arguments(parser)
  parser.set_defaults(run=run)

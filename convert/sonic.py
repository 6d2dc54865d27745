"""`python -m convert sonic`: the release of Sonic to one model folder.

Sonic is the predecessor of DICE-Talk, without emotions.
"""

import argparse
from typing import Any

from convert import model_folder, published_layouts, release_folder, svd

EXAMPLE = """example:
  python -m convert sonic checkpoints/Sonic models/sonic \\
      --svd checkpoints/stable-video-diffusion-img2vid-xt \\
      --whisper checkpoints/whisper-tiny --rife checkpoints/RIFE

SRC holds unet.pth, audio2token.pth and audio2bucket.pth. All files must fit exactly.
Because unet.pth is a whole UNet, only the autoencoder, the image encoder and the
scheduler of --svd are read. The resulting model makes videos without --emotion."""

# Options that may be left out, and what the model lacks then.
OPTIONS = {
  'svd': 'vae, image_encoder',
  'whisper': 'whisper',
  'rife': 'flownet',
  'taesdv': 'taesdv (no previews)',
  'face_detector': 'face_detector (MTCNN finds faces instead)',
}

# Where Sonic's reference implementation differs from DICE-Talk's.
SETTINGS = {'kind': 'sonic', 'decode_chunk': 8, 'upcast_vae': False}
SAMPLER = {'g_image': 2.0, 'g_condition': 7.5, 'padding': False}


def run(args: argparse.Namespace) -> int:
  model_folder.refuse(args)
  own = release_folder.own_config(args.source, 'sonic')
  parts = [
    release_folder.part(args.source, 'sonic', name, own)
    for name in published_layouts.SONIC
  ]
  if args.svd:
    parts += svd.parts(args.svd, ('vae', 'image_encoder'))
  parts += release_folder.companions(args, own)
  notes = release_folder.missing_options(args, OPTIONS)
  model_folder.model_folder(args, parts, _settings(args, own), notes=notes)
  return 0


def _settings(args: argparse.Namespace, own: dict[str, Any]) -> dict[str, Any]:
  """Gives the settings of an exported model, or else the published ones."""
  if own.get('settings'):
    return own['settings'] | {'kind': 'sonic'}
  schedule = svd.settings(args.svd)['sampler'] if args.svd else {}
  return SETTINGS | {'sampler': SAMPLER | schedule}


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'sonic',
    help='convert the Sonic release',
    description='Converts the release of Sonic, and what it builds on, to one model '
    'folder.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  release_folder.add_arguments(parser)
  parser.set_defaults(run=run)

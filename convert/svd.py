"""`python -m convert svd`: Stable Video Diffusion XT to a model folder, with Whisper if
training is to start from it.
"""

import argparse
from collections.abc import Sequence
import pathlib
from typing import Any

from convert import model_folder, published_layouts, torch_files, whisper
from convert.component_check import Part
from dicetalk_jax.errors import WeightsError

EXAMPLE = """example:
  python -m convert svd downloads/stable-video-diffusion-img2vid-xt-1-1 models/svd \\
      --whisper downloads/whisper-tiny

Reads unet, vae, image_encoder and scheduler, in full precision or the fp16 variant,
whole or in shards (-xt has the same layout). With --whisper, the model has all that
training starts from. It has no emotion components: for the DICE-Talk release use
`python -m convert dicetalk ... --svd`."""

# The schedule that the sampler computes. Other values would need another sampler.
SCHEDULE = {
  'prediction_type': 'v_prediction',
  'use_karras_sigmas': True,
  'timestep_type': 'continuous',
}


def parts(
  folder: pathlib.Path, names: Sequence[str] = tuple(published_layouts.SVD)
) -> list[Part]:
  """Reads components of the folder."""
  without_adapters = {'unet': {'adapters': 0}}
  return [
    published_layouts.folder_part(
      name, folder / name, 'svd', **without_adapters.get(name, {})
    )
    for name in names
  ]


def settings(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the settings of the sampler from the published scheduler.

  Raises:
    WeightsError: the scheduler is of another kind.
  """
  path = folder / published_layouts.SCHEDULER
  config = torch_files.read_json(path)
  different = {
    key: config.get(key) for key, value in SCHEDULE.items() if config.get(key) != value
  }
  if different:
    raise WeightsError(
      f'{path} has {different} where the sampler wants {SCHEDULE}; use the folder of '
      'img2vid-xt'
    )
  sigmas = {key: config[key] for key in ('sigma_min', 'sigma_max') if key in config}
  return {'sampler': sigmas}


def run(args: argparse.Namespace) -> int:
  model_folder.refuse(args)
  found = parts(args.source)
  if args.whisper:
    found += whisper.parts(args.whisper)
  model_folder.model_folder(args, found, settings(args.source))
  return 0


def add_parser(commands) -> None:
  parser = commands.add_parser(
    'svd',
    help='convert Stable Video Diffusion XT',
    description='Converts the diffusers folder of Stable Video Diffusion XT.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  model_folder.add_arguments(parser)
  parser.add_argument(
    '--whisper', metavar='DIR', type=pathlib.Path, help='folder of whisper-tiny'
  )
  parser.set_defaults(run=run)

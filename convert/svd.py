"""`python -m convert svd`: Stable Video Diffusion XT to a model folder."""

import argparse
import pathlib
from typing import Any

from convert import model_folder, published_layouts, torch_files
from convert.component_check import Part
from dicetalk_jax.errors import WeightsError

EXAMPLE = """example:
  python -m convert svd downloads/stable-video-diffusion-img2vid-xt models/svd

Reads unet, vae, image_encoder and scheduler, in full precision or the fp16 variant, whole or in shards (-xt-1-1 has the
same layout). The result has no emotion parts: for DICE-Talk use `python -m convert dicetalk ... --svd`."""

# What the sampler computes; other values would need another sampler.
SCHEDULE = dict(
  prediction_type='v_prediction', use_karras_sigmas=True, timestep_type='continuous'
)


def parts(folder: pathlib.Path, names=tuple(published_layouts.SVD)) -> list[Part]:
  """Components of the folder."""
  plain = dict(unet=dict(adapters=0))
  return [
    published_layouts.folder_part(name, folder / name, 'svd', **plain.get(name, {}))
    for name in names
  ]


def settings(folder: pathlib.Path) -> dict[str, Any]:
  """What the published scheduler says to the sampler.

  Raises:
    WeightsError: it is of another kind.
  """
  path = folder / published_layouts.SCHEDULER
  config = torch_files.read_json(path)
  if other := {
    key: config.get(key) for key, value in SCHEDULE.items() if config.get(key) != value
  }:
    raise WeightsError(
      f'{path} has {other} where the sampler wants {SCHEDULE}; use the folder of '
      'img2vid-xt'
    )
  return dict(
    sampler={key: config[key] for key in ('sigma_min', 'sigma_max') if key in config}
  )


def run(args: argparse.Namespace) -> int:
  model_folder.refuse(args)
  model_folder.model_folder(args, parts(args.source), settings(args.source))
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
  parser.set_defaults(run=run)

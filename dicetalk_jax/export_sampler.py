"""Traces the sampler of a model ahead of time, so that a service starts without that.

    python -m dicetalk_jax.export_sampler --model=DIR --output=samplers \\
        --frames=100 --platforms=cuda,tpu
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

from dicetalk_jax import cli
from dicetalk_jax.bundle import ModelFolder
from dicetalk_jax.diffusion.sampler import SamplerConfig
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.media.image import target_size
from dicetalk_jax.pipeline import Pipeline, compute_dtype
from dicetalk_jax.sampler_file import SUFFIX
from dicetalk_jax.settings import Settings

# Those whose kernels can be written to a file.
PLATFORMS = ('cpu', 'cuda', 'tpu')


def _parser() -> argparse.ArgumentParser:
  parser = cli.OptionParser(
    prog='python -m dicetalk_jax.export_sampler',
    description='Traces the sampler of a model ahead of time, for devices that need '
    'not be here. Weights are not in the files.',
  )
  add = parser.add_argument
  add('--model', required=True, metavar='DIR', help='model folder')
  add(
    '--output',
    required=True,
    type=pathlib.Path,
    metavar='DIR',
    help=f'folder of the files: PLATFORM_WIDTHxHEIGHT_FRAMES_CLIPS{SUFFIX}',
  )
  add(
    '--frames',
    type=int,
    required=True,
    metavar='N',
    help='frames of a clip, 12.5 per second as published; rounded up to a bucket',
  )
  add('--batch', type=int, default=1, metavar='N', help='clips sampled together')
  add(
    '--size',
    type=_size,
    metavar='WIDTHxHEIGHT',
    help="of the frames (default: a square of the model's size)",
  )
  add(
    '--platforms',
    default='cpu',
    metavar='NAMES',
    help=f'one or several of {",".join(PLATFORMS)}; a file each',
  )
  add(
    '--set',
    action='append',
    default=[],
    type=_setting,
    metavar='NAME=VALUE',
    help='another sampling setting, such as num_steps=10; may be repeated',
  )
  return parser


def _size(text: str) -> tuple[int, int]:
  width, _, height = text.partition('x')
  if not (width.isdecimal() and height.isdecimal()):
    raise argparse.ArgumentTypeError(f'{text!r} is no size; write WIDTHxHEIGHT')
  return int(width), int(height)


def _setting(text: str) -> tuple[str, Any]:
  name, _, value = text.partition('=')
  try:
    read = json.loads(value)
  except ValueError:
    raise argparse.ArgumentTypeError(
      f'{text!r} is not understood; write NAME=VALUE with a number, a list of numbers, '
      'true, false or null'
    ) from None
  return name, tuple(read) if isinstance(read, list) else read


def main(argv: list[str]) -> None:
  """Writes one file per platform."""
  flags = _parser().parse_args(argv)

  # 1. Check everything that can be wrong.
  platforms = flags.platforms.split(',')
  unknown = [name for name in platforms if name not in PLATFORMS]
  if unknown:
    raise ConfigError(
      f'--platforms={flags.platforms}: unknown platform {unknown[0]!r}; choose of '
      f'{",".join(PLATFORMS)}'
    )
  for name in ('frames', 'batch'):
    if getattr(flags, name) < 1:
      raise ConfigError(f'--{name} must be at least 1, got {getattr(flags, name)}')
  model = ModelFolder.open(flags.model)
  settings = _settings(model, dict(flags.set))
  size = _frame_size(settings, flags.size)

  # 2. Export.
  for platform in platforms:
    pipe = Pipeline.abstract(model, compute_dtype(platform), **dict(flags.set))
    sampler = pipe.export_sampler(platform, flags.batch, flags.frames, size)
    bucket = pipe.encoder.bucket(flags.frames)
    name = f'{platform}_{size[0]}x{size[1]}_{bucket}_{flags.batch}{SUFFIX}'
    path = flags.output / name
    sampler.save(path)
    print(
      f'wrote {path}: clips of up to {bucket} frames, {bucket / settings.fps:g} s',
      flush=True,
    )


def _settings(model: ModelFolder, changes: dict[str, Any]) -> Settings:
  """Those of the model with the changes of the flags.

  Raises:
    ConfigError: there is no such setting, or it cannot have this value.
  """
  known = [field.name for field in dataclasses.fields(SamplerConfig)]
  for name in changes:
    if name not in known:
      raise ConfigError(
        f'--set {name}: there is no such setting; choose of {", ".join(known)}'
      )
  try:
    return Settings.of(model, **changes)
  except TypeError as error:
    given = ', '.join(f'{name}={value!r}' for name, value in changes.items())
    raise ConfigError(
      f'--set: one of {given} is of the wrong type; give it as `SamplerConfig` has it'
    ) from error


def _frame_size(settings: Settings, size: tuple[int, int] | None) -> tuple[int, int]:
  """(width, height) that the model generates.

  Raises:
    ConfigError: it generates no such size.
  """
  if size is None:
    size = settings.image_size, settings.image_size
  width, height = size
  generated = target_size(width, height, min(size), settings.multiple)
  if generated != size:
    raise ConfigError(
      f'--size={width}x{height} is never generated, as sides are multiples of '
      f'{settings.multiple}; choose --size={generated[0]}x{generated[1]}'
    )
  return size


def run() -> None:
  """Console entry."""
  cli.run(main, _parser())


if __name__ == '__main__':
  run()

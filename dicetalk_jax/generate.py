"""Turns a portrait, speech and an emotion into a talking video.

    python -m dicetalk_jax.generate --model=DIR --image=face.jpg --audio=speech.wav \\
        --emotion=happy --output=out.mp4
"""

import argparse
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dicetalk_jax import cli, parallel
from dicetalk_jax.bundle import ModelFolder
from dicetalk_jax.compiled import keep_programs
from dicetalk_jax.detect.choice import parse_face_index
from dicetalk_jax.errors import InputError
from dicetalk_jax.job import Job
from dicetalk_jax.media.audio import load_recording
from dicetalk_jax.media.face import parse_face_box
from dicetalk_jax.media.image import load_image
from dicetalk_jax.media.soundtrack import Soundtrack
from dicetalk_jax.media.video import CRF, write_video
from dicetalk_jax.models import fused
from dicetalk_jax.pipeline import Pipeline, compute_dtype
from dicetalk_jax.progress import Progress
from dicetalk_jax.settings import INTERPOLATION, Settings


def _parser() -> argparse.ArgumentParser:
  parser = cli.OptionParser(
    prog='python -m dicetalk_jax.generate',
    description='Turns a portrait, speech and an emotion into a talking video.',
  )
  add = parser.add_argument
  add(
    '--model',
    required=True,
    metavar='DIR',
    help='model folder, from python -m convert or from training',
  )
  add(
    '--image',
    required=True,
    metavar='FILE',
    help='portrait of one person: JPEG, PNG or WebP',
  )
  add(
    '--audio',
    required=True,
    metavar='FILE',
    help='speech: wav, flac, mp3, m4a, or a video with audio',
  )
  add(
    '--emotion',
    metavar='NAME',
    help="one of the model's emotions, such as happy; a Sonic model takes none",
  )
  add(
    '--output',
    required=True,
    metavar='FILE.mp4',
    help='the video; missing folders are made',
  )
  add(
    '--face_box',
    metavar='x0,y0,x1,y1',
    help='corners of the face in pixels, if it is not found',
  )
  add(
    '--face_index',
    metavar='N',
    help='which of several faces, counted from left to right from 1 on (default: the '
    'largest); published: the choice of the reference implementation',
  )
  add(
    '--crop',
    action='store_true',
    help='use only a square around the face, grown by half its size on every side',
  )
  add(
    '--image_size',
    type=int,
    metavar='PIXELS',
    help="shorter side of the generated frames (default: the model's, 512 as "
    'published); both sides become multiples of 64',
  )
  add(
    '--keep_resolution',
    action='store_true',
    help='scale the video to the size of the image, or of the crop',
  )
  add(
    '--crf',
    type=int,
    default=CRF,
    metavar='0-51',
    help='quality of the video file; smaller is better and larger',
  )
  add('--seed', type=int, default=0, help='random seed: another one, another video')
  add(
    '--noise',
    metavar='FILE.npy',
    help='start noise of the reference implementation, in place of a seed: '
    '(1, frames, 4, height/8, width/8)',
  )
  add(
    '--steps',
    type=int,
    help="denoising steps (default: the model's, 25 as published); fewer are faster "
    'and rougher',
  )
  add(
    '--guidance_image',
    type=float,
    metavar='WEIGHT',
    help="how closely to follow the portrait (default: the model's, 3 as published)",
  )
  add(
    '--guidance_condition',
    type=float,
    metavar='WEIGHT',
    help='how closely to follow speech and emotion '
    "(default: the model's, 6 as published)",
  )
  add(
    '--sampler',
    action='append',
    default=[],
    metavar='FILE',
    help='from python -m dicetalk_jax.export_sampler: clips of its shape start without '
    'tracing, on one device; may be repeated',
  )
  add(
    '--fill_memory',
    action='store_true',
    help='compute as many windows at once as the memory of the device holds, which is '
    "faster for small models (default: the model's, one as published)",
  )
  add(
    '--interpolate',
    action=argparse.BooleanOptionalAction,
    help='double the frame rate, 12.5 per second as published '
    '(default: if the model has a flownet)',
  )
  add(
    '--fused_kernels',
    action='store_true',
    help='fewer passes over memory on NVIDIA GPUs, Ampere or later; the same video '
    'within rounding. Not timed on a GPU yet',
  )
  add(
    '--preview',
    action='store_true',
    help='decode quickly and roughly, with taesdv, if the model has it',
  )
  return parser


def main(argv: list[str]) -> None:
  """Generates one video."""
  flags = _parser().parse_args(argv)
  keep_programs()

  # 1. Check everything that can be wrong, before weights are read.
  sampling = _sampling(flags)
  model = ModelFolder.open(flags.model)
  settings = Settings.of(model, **sampling)
  model.require(*settings.components)
  recording = load_recording(flags.audio)
  sound = Soundtrack(flags.audio, recording.loudest)
  job = _job(flags, model, settings, recording.wave)
  _check_writable(flags.output)

  # 2. Generate.
  progress = _progress_bars()
  pipe = Pipeline.load(
    model,
    # Exported samplers run on one device.
    None if flags.sampler else _mesh(),
    compute_dtype(jax.default_backend()),
    progress=progress,
    samplers=flags.sampler,
    fill_memory=flags.fill_memory,
    **sampling,
  )
  with fused.kernels(flags.fused_kernels):
    frames, fps = pipe.run(job, progress)

  # 3. Write the video.
  count, height, width, _ = frames.shape
  if job.video_size:
    width, height = job.video_size
  write_video(flags.output, frames, fps, audio=sound, size=job.video_size, crf=job.crf)
  print(
    f'{flags.output}: {count / fps:.1f} s, {width}x{height}, {count} frames at {fps:g} '
    'per second'
  )
  is_able = INTERPOLATION in model.components
  if flags.interpolate is None and not is_able and not flags.preview:
    print(f'{model} has no {INTERPOLATION}, which would double the frame rate')


def _sampling(flags: argparse.Namespace) -> dict[str, Any]:
  """Changes to the model's `SamplerConfig`."""
  changes = {
    'num_steps': flags.steps,
    'g_image': flags.guidance_image,
    'g_condition': flags.guidance_condition,
  }
  return {name: value for name, value in changes.items() if value is not None}


def _job(
  flags: argparse.Namespace, model: ModelFolder, settings: Settings, wave: np.ndarray
) -> Job:
  """Reads the files, and checks them with the other flags."""
  image = load_image(flags.image)
  height, width = image.shape[:2]
  face_box = None
  if flags.face_box and flags.face_index:
    raise InputError(
      '--face_box and --face_index both say where the face is; leave one of them out'
    )
  if flags.face_box:
    face_box = parse_face_box(flags.face_box, (width, height))
  return Job.check(
    model,
    settings,
    image,
    wave,
    flags.emotion,
    face_box=face_box,
    face_index=parse_face_index(flags.face_index),
    seed=flags.seed,
    noise=_load_noise(flags.noise) if flags.noise else None,
    interpolate=flags.interpolate,
    preview=flags.preview,
    crop=flags.crop,
    image_size=flags.image_size,
    keep_resolution=flags.keep_resolution,
    crf=flags.crf,
  )


def _load_noise(path: str) -> np.ndarray:
  """`[T, h, w, C]` from a file as the reference implementation has it.

  It holds `[1, T, C, h, w]`.
  """
  try:
    noise = np.load(path, allow_pickle=False)
  except (OSError, ValueError) as error:
    raise InputError(
      f'{path} cannot be read as an array; save the noise with numpy.save'
    ) from error
  if noise.ndim != 5 or len(noise) != 1:
    raise InputError(
      f'{path} has the shape {noise.shape} instead of (1, frames, 4, height/8, '
      'width/8); save the noise that the reference implementation starts from'
    )
  return np.moveaxis(noise[0], 1, -1)


def _check_writable(output: str) -> None:
  """Finds out now, not after minutes, that there is no place for the result."""
  path = pathlib.Path(output)
  if path.suffix.lower() != '.mp4':
    raise InputError(f'{output}: videos are written as MP4; end the name in .mp4')
  if path.is_dir():
    raise InputError(f'cannot write {output}: it is a folder; name a file')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
      pass
  except OSError as error:
    raise InputError(
      f'cannot write {output}: {error.strerror}; choose another place'
    ) from error


def _mesh() -> jax.sharding.Mesh | None:
  """All devices share the windows of a clip; each has all parameters."""
  return parallel.make_mesh(data=-1, fsdp=1) if jax.device_count() > 1 else None


def _progress_bars() -> Progress:
  """One bar per stage, on stderr."""
  bars: dict[str, tqdm] = {}

  def progress(stage: str, done: int, total: int) -> None:
    if stage not in bars:
      bars[stage] = tqdm(total=total, desc=stage, unit='step')
    bars[stage].update(done - bars[stage].n)
    if done == total:
      bars[stage].close()

  return progress


def run() -> None:
  """Console entry."""
  cli.run(main, _parser())


if __name__ == '__main__':
  run()

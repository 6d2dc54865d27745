"""The creator's entry: portrait, speech and emotion to a video with sound.

python -m dicetalk_jax.generate --model=DIR --image=face.jpg --audio=speech.wav
--emotion=happy --output=out.mp4
"""

import argparse
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dicetalk_jax import bundle, cli, parallel
from dicetalk_jax.errors import InputError
from dicetalk_jax.media.audio import load_audio
from dicetalk_jax.media.face import find_face, parse_face_box
from dicetalk_jax.media.image import load_image
from dicetalk_jax.media.video import write_video
from dicetalk_jax.pipeline import INTERPOLATION, Pipeline, Progress, Settings

USAGE = """\
usage: python -m dicetalk_jax.generate --model=DIR --image=FILE --audio=FILE --emotion=NAME --output=FILE.mp4
  --model               model folder, from python -m convert or from training
  --image               portrait of one person: JPEG, PNG or WebP
  --audio               speech: wav, flac, mp3, m4a, or a video with sound
  --emotion             one of the model's emotions, such as happy; a Sonic model takes none
  --output              the video; missing folders are made
  --face_box=x0,y0,x1,y1  corners of the face in pixels, where it is not found
  --seed                another number, another video (default 0)
  --noise=FILE.npy      start noise of the original program, (1, frames, 4, height/8, width/8), in place of a seed
  --steps               denoising steps (default: the model's, 25 as published); fewer are faster and rougher
  --guidance_image      how closely to follow the portrait (default: the model's, 3 as published)
  --guidance_condition  how closely to follow speech and emotion (default: the model's, 6 as published)
  --no-interpolate      leave the frame rate as it is, 12.5 per second as published; else it is doubled, if the model
                        has a flownet (--interpolate insists on it)
"""


def _flags(argv: list[str]) -> argparse.Namespace:
  parser = cli.Parser('dicetalk_jax.generate', USAGE)
  for name in ('model', 'image', 'audio', 'output'):
    parser.add_argument(f'--{name}', required=True)
  parser.add_argument('--emotion')
  parser.add_argument('--face_box')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--noise')
  parser.add_argument('--steps', type=int)
  parser.add_argument('--guidance_image', type=float)
  parser.add_argument('--guidance_condition', type=float)
  parser.add_argument('--interpolate', action=argparse.BooleanOptionalAction)
  return parser.parse_args(argv)


def main(argv: list[str]) -> None:
  """Generates one video.

  Everything that can be wrong is checked before weights are read.
  """
  flags = _flags(argv)
  sampling = dict(
    num_steps=flags.steps,
    g_image=flags.guidance_image,
    g_condition=flags.guidance_condition,
  )
  sampling = {name: value for name, value in sampling.items() if value is not None}
  settings = Settings.of(flags.model, **sampling)
  known = bundle.require(
    flags.model, *settings.components, *[INTERPOLATION] * bool(flags.interpolate)
  )
  settings.check_emotion(flags.emotion is not None)
  prior = (
    None if flags.emotion is None else bundle.load_prior(flags.model, flags.emotion)[0]
  )
  image = load_image(flags.image)
  face_box = (
    parse_face_box(flags.face_box, image.shape[1::-1])
    if flags.face_box
    else find_face(image)
  )
  wave = load_audio(flags.audio)
  settings.frames_of(wave)
  noise = _load_noise(flags.noise) if flags.noise else None
  _check_writable(flags.output)

  _keep_compiled_programs()
  progress = _progress_bars()
  dtype = None if jax.default_backend() == 'cpu' else jnp.bfloat16
  pipe = Pipeline.load(
    flags.model,
    _mesh(),
    dtype,
    progress=progress,
    **sampling,
  )
  frames, fps = pipe.generate(
    image,
    wave,
    prior=prior,
    face_box=face_box,
    seed=flags.seed,
    noise=noise,
    interpolate=flags.interpolate,
    progress=progress,
  )
  write_video(flags.output, frames, fps, audio=wave)
  count, height, width, _ = frames.shape
  print(
    f'{flags.output}: {count / fps:.1f} s, {width}x{height}, {count} frames at {fps:g} '
    'per second'
  )
  if flags.interpolate is None and INTERPOLATION not in known:
    print(f'{flags.model} has no {INTERPOLATION}, which would double the frame rate')


def _load_noise(path: str) -> np.ndarray:
  """`[T, h, w, C]` from a file in the original program's layout, `[1, T, C, h, w]`."""
  try:
    noise = np.load(path, allow_pickle=False)
  except (OSError, ValueError) as error:
    raise InputError(
      f'{path} cannot be read as an array; save the noise with numpy.save'
    ) from error
  if noise.ndim != 5 or len(noise) != 1:
    raise InputError(
      f'{path} has the shape {noise.shape} instead of (1, frames, 4, height/8, '
      'width/8); save the noise that the original program starts from'
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


def _keep_compiled_programs() -> None:
  """Compiling takes minutes at full size: the next run finds it done.

  `JAX_COMPILATION_CACHE_DIR` moves the place.
  """
  if jax.config.jax_compilation_cache_dir is None:
    cache = pathlib.Path(
      os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    )
    jax.config.update('jax_compilation_cache_dir', str(cache / 'dicetalk_jax'))


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
  cli.run(main, USAGE)


if __name__ == '__main__':
  run()

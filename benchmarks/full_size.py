"""Converts, loads and runs the model of 1.5 billion parameters once.

  python -m benchmarks.full_size --image=face.jpg --audio=speech.wav

Writes random files of full size in the published layout (float16), converts them by the
command line, loads the model folder and makes a video of a photograph and a recording:
on a CPU two denoising steps at 64 pixels, the smallest side that the architecture
allows, on an accelerator 25 steps of 2 s at 512 pixels in bfloat16. Prints seconds per
stage and peak memory. The weights are random, so the video shows nothing; its numbers
must be finite. Takes about 14 GB of disk, freed at the end unless `--model` names a
place to keep the model folder in. Linux only.
"""

import argparse
import contextlib
import pathlib
import resource
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.processes import run_module
from dicetalk_jax import bundle, model_references
from dicetalk_jax.media.audio import RATE, load_audio
from dicetalk_jax.media.image import load_image
from dicetalk_jax.media.video import write_video
from dicetalk_jax.pipeline import Pipeline

GIB = 2**30


class Workload(NamedTuple):
  """The video to make: side in pixels, seconds of audio, denoising steps, type."""

  size: int
  seconds: float
  steps: int
  dtype: str


CPU = Workload(size=64, seconds=0.5, steps=2, dtype='float32')
ACCELERATOR = Workload(size=512, seconds=2.0, steps=25, dtype='bfloat16')


class Clock:
  """Prints how long each stage and each of its steps took, with peak memory."""

  def __init__(self) -> None:
    self.last = time.perf_counter()

  def lap(self, stage: str) -> None:
    """Prints the time since the last lap."""
    now = time.perf_counter()
    print(f'{stage:28} {now - self.last:8.1f} s   {peak_memory()}', flush=True)
    self.last = now

  def progress(self, stage: str, done: int, total: int) -> None:
    """Prints a step of a stage; has the signature of the pipeline's progress."""
    if done == 0:
      return
    compiles = done == 1 and stage != 'loading'
    note = ' (compiles)' if compiles else ''
    self.lap(f'{stage} {done}/{total}{note}')


def peak_memory() -> str:
  """The most memory that this process has used, here and on the device."""
  kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  text = f'peak memory {kib / 2**20:.1f} GiB'
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    text += f', of the device {stats["peak_bytes_in_use"] / GIB:.1f} GiB'
  return text


def build_model(model: pathlib.Path) -> None:
  """Writes random files, and converts them to a model folder."""
  with tempfile.TemporaryDirectory(dir=model.parent) as place:
    folder = pathlib.Path(place)
    usage = run_module('benchmarks.published_files', folder)
    size = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    print(f'{size / 1e9:.1f} GB of files written in {usage.seconds:.0f} s', flush=True)

    flags = (
      *('--svd', folder / 'svd'),
      *('--whisper', folder / 'whisper'),
      *('--rife', folder / 'rife'),
      *('--priors', folder / 'emo'),
    )
    usage = run_module('convert', 'dicetalk', folder / 'dicetalk', model, *flags)
    print(
      f'converted in {usage.seconds:.0f} s, peak memory {usage.own / GIB:.1f} GiB',
      flush=True,
    )


def choose_workload(args: argparse.Namespace) -> Workload:
  """The default of this device, with what the flags say instead."""
  on_cpu = jax.local_devices()[0].platform == 'cpu'
  defaults = CPU if on_cpu else ACCELERATOR
  given = {name: getattr(args, name) for name in Workload._fields}
  return defaults._replace(**{name: x for name, x in given.items() if x})


def sample(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """Loads the model and makes a video; `folder` is an empty one to work in."""
  work = choose_workload(args)
  print(
    f'{jax.local_devices()[0].device_kind}: {work.steps} steps, {work.seconds} s at '
    f'{work.size} pixels, {work.dtype}',
    flush=True,
  )
  clock = Clock()

  # 1. Load. The size is set in a folder that refers to the model: the model itself
  # stays as it is.
  model_references.adopt(
    args.model, folder, trained=(), needed=(), priors=True, resuming=False
  )
  bundle.save_settings(folder, {'image_size': work.size})
  pipe = Pipeline.load(
    folder, dtype=jnp.dtype(work.dtype), num_steps=work.steps, progress=clock.progress
  )
  count = sum(entry['parameters'] for entry in bundle.components(folder).values())
  levels = pipe.networks['unet'].config.levels
  print(
    f'{count / 1e9:.2f} billion parameters, {levels} levels in the UNet', flush=True
  )

  # 2. Encode the conditions
  image = load_image(args.image)
  wave = load_audio(args.audio)[: int(work.seconds * RATE)]
  conditions, length = pipe.conditions(pipe.job(image, wave, 'happy'))
  jax.block_until_ready(conditions)
  clock.lap('conditions (compiles)')

  # 3. Sample
  keys = jax.random.key(0)[None]
  latents = pipe.sample(conditions, [length], keys, clock.progress)
  deviation = float(np.std(latents[0, :length]))
  assert np.isfinite(deviation), 'the latents are not finite'
  print(f'{length} frames, latents {latents.shape[2:]} with deviation {deviation:.2f}')

  # 4. Decode, without and with interpolated frames
  pipe.decode(latents[0], length)
  clock.lap('decoded (compiles)')
  frames = pipe.decode(latents[0], length, interpolate=True)
  clock.lap('decoded and doubled (compiles)')
  write_video(args.output, frames, 2 * pipe.settings.fps, audio=wave)
  clock.lap(f'{args.output} written')


def main() -> None:
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.full_size', description=__doc__.split('\n')[0]
  )
  parser.add_argument('--image', required=True, help='image file of a portrait')
  parser.add_argument('--audio', required=True, help='audio file with speech')
  parser.add_argument(
    '--output',
    default='full_size.mp4',
    help='video file to write (default: %(default)s)',
  )
  parser.add_argument(
    '--model',
    help='model folder to use, or to make and keep (default: a temporary one)',
  )
  workload = parser.add_argument_group(
    'workload', 'by default for a CPU or for an accelerator'
  )
  workload.add_argument('--size', type=int, help='shorter side in pixels')
  workload.add_argument('--seconds', type=float, help='how much of the audio to use')
  workload.add_argument('--steps', type=int, help='denoising steps')
  workload.add_argument('--dtype', help='compute type')
  args = parser.parse_args()

  with contextlib.ExitStack() as stack:

    def temporary_folder() -> pathlib.Path:
      return pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))

    if not args.model:
      args.model = str(temporary_folder() / 'model')
    if bundle.components(args.model):
      sample(args, temporary_folder())
      return
    build_model(pathlib.Path(args.model))
    # A process that has built nothing, so that its memory is that of sampling.
    given = {name: value for name, value in vars(args).items() if value is not None}
    flags = [f'--{name}={value}' for name, value in given.items()]
    run_module('benchmarks.full_size', *flags)


if __name__ == '__main__':
  main()

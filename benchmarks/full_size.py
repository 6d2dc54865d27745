"""The 1.5B-parameter model, once, really: `python -m benchmarks.full_size
--image=face.jpg --audio=speech.wav`.

Writes random files of full size in the published layout (float16), converts them by the
command line, loads the model folder and makes a video of a photograph and a recording:
on a CPU two denoising steps at 64 pixels, the smallest side that the architecture
allows, on an accelerator 25 steps of 2 s at 512 pixels in bfloat16. Prints seconds per
stage and peak memory. The weights are random, so the video shows nothing; its numbers
must be finite. About 14 GB of disk, freed at the end unless `--model` names a place to
keep the model folder in. Linux only.
"""

import argparse
import contextlib
import pathlib
import resource
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.processes import measure
from dicetalk_jax import bundle, model_references
from dicetalk_jax.media.audio import RATE, load_audio
from dicetalk_jax.media.image import load_image
from dicetalk_jax.media.video import write_video
from dicetalk_jax.pipeline import Pipeline

CPU = dict(size=64, seconds=0.5, steps=2, dtype='float32')
ACCELERATOR = dict(size=512, seconds=2.0, steps=25, dtype='bfloat16')


class Clock:
  """Prints how long each stage took, and each of its steps."""

  def __init__(self):
    self.last = time.perf_counter()

  def lap(self, what: str) -> None:
    now = time.perf_counter()
    print(f'{what:28} {now - self.last:8.1f} s   {self._memory()}', flush=True)
    self.last = now

  def progress(self, stage: str, done: int, total: int) -> None:
    if done:
      self.lap(
        f'{stage} {done}/{total}' + (' (compiles)' * (done == 1 and stage != 'loading'))
      )

  @staticmethod
  def _memory() -> str:
    peak = f'peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB'
    device = (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
    return peak + (f', of the device {device / 2**30:.1f} GiB' if device else '')


def build(model: str) -> None:
  """Random files, and `python -m convert dicetalk`."""
  with tempfile.TemporaryDirectory(dir=pathlib.Path(model).parent) as place:
    folder = pathlib.Path(place)
    peak = measure('benchmarks.published_files', folder)
    size = sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    print(f'{size / 1e9:.1f} GB of files written in {peak.seconds:.0f} s', flush=True)
    peak = measure(
      'convert',
      'dicetalk',
      folder / 'dicetalk',
      model,
      '--svd',
      folder / 'svd',
      '--whisper',
      folder / 'whisper',
      '--rife',
      folder / 'rife',
      '--priors',
      folder / 'emo',
    )
    print(
      f'converted in {peak.seconds:.0f} s, peak memory {peak.own / 2**30:.1f} GiB',
      flush=True,
    )


def sample(args: argparse.Namespace, folder: pathlib.Path) -> None:
  """Loads and generates; `folder` is an empty one to work in."""
  device = jax.local_devices()[0]
  defaults = CPU if device.platform == 'cpu' else ACCELERATOR
  size, seconds, steps, dtype = (
    getattr(args, key) or value for key, value in defaults.items()
  )
  print(
    f'{device.device_kind}: {steps} steps, {seconds} s at {size} pixels, {dtype}',
    flush=True,
  )
  clock = Clock()
  # The size is set in a folder that refers to the model: the model itself stays as it
  # is.
  model_references.adopt(
    args.model, folder, trained=(), needed=(), priors=True, resuming=False
  )
  bundle.save_settings(folder, {'image_size': size})
  pipe = Pipeline.load(
    folder, dtype=jnp.dtype(dtype), num_steps=steps, progress=clock.progress
  )
  count = sum(entry['parameters'] for entry in bundle.components(folder).values())
  print(
    f'{count / 1e9:.2f} billion parameters, {pipe.networks["unet"].config.levels} '
    'levels in the UNet',
    flush=True,
  )
  image, wave = load_image(args.image), load_audio(args.audio)[: int(seconds * RATE)]
  conditions, length = pipe.conditions(pipe.job(image, wave, 'happy'))
  jax.block_until_ready(conditions)
  clock.lap('conditions (compiles)')
  latents = pipe.sample(conditions, [length], jax.random.key(0)[None], clock.progress)
  deviation = float(np.std(latents[0, :length]))
  assert np.isfinite(deviation), 'the latents are not finite'
  print(f'{length} frames, latents {latents.shape[2:]} with deviation {deviation:.2f}')
  for doubled in ('decoded', 'decoded and doubled'):
    frames = pipe.decode(latents[0], length, interpolate=doubled != 'decoded')
    clock.lap(f'{doubled} (compiles)')
  write_video(args.output, frames, 2 * pipe.settings.fps, audio=wave)
  clock.lap(f'{args.output} written')


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--image', required=True, help='a portrait')
  parser.add_argument('--audio', required=True, help='speech')
  parser.add_argument('--output', default='full_size.mp4')
  parser.add_argument(
    '--model', help='model folder to use, or to make and keep; else a temporary one'
  )
  for name, kind in (('size', int), ('seconds', float), ('steps', int), ('dtype', str)):
    parser.add_argument(f'--{name}', type=kind)
  args = parser.parse_args()
  with contextlib.ExitStack() as stack:
    if not args.model:
      args.model = str(
        pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / 'model'
      )
    if not bundle.components(args.model):
      build(args.model)
      # Apart from what built it, so that the memory is that of sampling.
      flags = [
        f'--{name}={value}' for name, value in vars(args).items() if value is not None
      ]
      measure('benchmarks.full_size', *flags)
    else:
      sample(args, pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())))


if __name__ == '__main__':
  main()

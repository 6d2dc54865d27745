"""From nothing to a talking face: `make demo`, or `python -m examples.demo`.

Generates the synthetic data set and trains the three tiny tasks for a short while. Then
one person whom training never saw says one sentence that it never heard in four
emotions, and the result is measured against the exact truth. The tiny models show that
every part works together; they say nothing about the quality of the published weights.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from PIL import Image
import soundfile

from configs import autoencoder, diffusion, embedder
from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import TINY, SyntheticConfig, jobs
from data_pipelines.synthetic.clip import Clip, make_clip, make_portrait
from dicetalk_jax import cli, model_references
from dicetalk_jax.errors import one_sentence
from dicetalk_jax.main import task_class
from dicetalk_jax.media import contact_sheet, video
from dicetalk_jax.metrics.judges import Judges
from dicetalk_jax.metrics.lip_sync import lip_sync
from dicetalk_jax.pipeline import Pipeline
from dicetalk_jax.training import loop

EMOTIONS = ('happy', 'angry', 'sad', 'surprised')
STRONGEST = 3  # level of the emotions
SECONDS = 2.4
# In this order: each task reads the model of the one before.
CONFIGS = {
  'autoencoder': autoencoder.get_config,
  'embedder': embedder.get_config,
  'diffusion': diffusion.get_config,
}
COLUMNS = 9  # of the contact sheet
ENLARGEMENT = 4  # of the videos

Scores = dict[str, dict[str, list[Any]]]  # video -> what was measured -> per emotion


def main() -> None:
  """Runs all stages, and prints what they achieved."""
  parser = cli.OptionParser(
    prog='python -m examples.demo',
    description='From nothing to a talking face: data, training, generation, scores.',
  )
  parser.add_argument(
    '--folder',
    default='demo',
    type=pathlib.Path,
    metavar='DIR',
    help='everything is written here',
  )
  parser.add_argument(
    '--smallest',
    action='store_true',
    help='a few steps only: checks that all parts run',
  )
  flags = parser.parse_args()
  flags.folder.mkdir(parents=True, exist_ok=True)
  share_cores()
  started = time.monotonic()

  prepare(flags.folder, flags.smallest)
  train(flags.folder, flags.smallest)
  with stage('generating'):
    scores = generate(flags.folder)

  minutes = round((time.monotonic() - started) / 60, 1)
  report = json.dumps(scores | {'minutes': minutes}, indent=2)
  (flags.folder / 'report.json').write_text(report + '\n')
  print_report(scores, minutes, flags.folder)


def share_cores() -> None:
  """Gives JAX a device per core, four at most.

  On CPUs, the diffusion step is faster with a part of the batch on each core.
  """
  cores = os.cpu_count() or 1
  power_of_two = 1 << cores.bit_length() - 1
  jax.config.update('jax_num_cpu_devices', min(4, power_of_two))


def prepare(folder: pathlib.Path, small: bool) -> None:
  """Renders the synthetic data set, or finds it where it was rendered before."""
  settings = dataclasses.replace(TINY, train=4, val=2, clips=16) if small else TINY
  with stage('rendering the data set'):
    prepare_synthetic(folder / 'data', settings)


def train(folder: pathlib.Path, small: bool) -> None:
  """Runs the three tasks one after the other, and packs the last model."""
  model = ''
  for task, get_config in CONFIGS.items():
    config = get_config('tiny')
    if small:
      shorten(config)
    config.model = model
    with stage(f'training the {task}, {config.total_steps} steps'):
      loop.train(task_class(task), config, folder / task)
    model = str(folder / task / 'model')
  model_references.pack(model, folder / 'model', overwrite=True)


def shorten(config: ml_collections.ConfigDict) -> None:
  """Cuts a tiny configuration down to what shows that everything runs.

  What the model then generates looks like noise.
  """
  steps = 20 if config.task == 'embedder' else 10
  config.total_steps = steps
  config.eval_every = steps
  config.checkpoint_every = steps
  config.log_every = 5
  config.optim.name = 'adam'  # Muon compiles for minutes
  config.optim.warmup = 2


def generate(folder: pathlib.Path) -> Scores:
  """Writes the portrait, the speech, the videos and the contact sheet.

  Returns:
    What was measured of the generated videos, of the truth, and of the truth after the
    autoencoder, which is the best that the model could draw.
  """
  pipe = Pipeline.load(folder / 'model')
  size = pipe.settings.image_size

  # 1. The person, and how each emotion would truly look.
  identity, truths = perform(size)
  portrait_size = 4 * size
  portrait, box = make_portrait(identity, portrait_size, zoom=TINY.zoom)
  left, top, right, bottom = box * portrait_size
  contact_sheet.save_image(folder / 'portrait.png', portrait)
  speech = truths[EMOTIONS[0]].audio
  soundfile.write(folder / 'speech.wav', speech, 16_000)

  judges = Judges.load()
  scores: Scores = {}
  rows = []
  for emotion, truth in truths.items():
    # 2. Generate, and take the frames of the truth that fall on the same times.
    generated, fps = pipe.generate(
      portrait,
      truth.audio,
      emotion=f'{emotion}_{STRONGEST}',
      face_box=(left, top, right - left, bottom - top),
      seed=1,
      interpolate=False,
    )
    real = truth.frames[::2][: len(generated)]
    generated = generated[: len(real)]
    opening = truth.opening[::2][: len(real)]
    face = truth.bbox[: 2 * len(real) : 2].mean(0)

    # 3. Score.
    videos = {
      'generated': generated,
      'truth': real,
      'autoencoded truth': pipe.reconstruct(real),
    }
    for name, frames in videos.items():
      reading = judges.read(frames, face)
      sync = lip_sync(reading.opening, opening, fps)
      measured = {
        'asked': emotion,
        'recognised': reading.recognised,
        'lip_sync': round(sync.correlation, 3),
      }
      for key, value in measured.items():
        scores.setdefault(name, {}).setdefault(key, []).append(value)

    # 4. Show.
    shown = np.linspace(0, len(real) - 1, COLUMNS).round().astype(int)
    rows.append((f'{emotion}: truth', list(real[shown])))
    rows.append((f'{emotion}: generated', list(generated[shown])))
    large = enlarge(generated)
    compared = contact_sheet.side_by_side(
      [enlarge(real), large], [f'{emotion}: truth', 'generated']
    )
    video.write_video(folder / f'{emotion}.mp4', large, fps, audio=truth.audio)
    video.write_video(
      folder / f'{emotion}_beside_truth.mp4', compared, fps, audio=truth.audio
    )
  contact_sheet.contact_sheet(
    rows,
    [f'{frame / fps:.1f} s' for frame in shown],
    scale=2,
    path=folder / 'sheet.png',
  )
  return scores


def perform(size: int) -> tuple[int, dict[str, Clip]]:
  """A held-out person who says one held-out sentence in each emotion.

  Returns:
    The identity, and the clips as the data set would render them.
  """
  job = jobs(SyntheticConfig(test=1), 'test')[0]
  clips = {
    emotion: make_clip(
      job.identity,
      emotion,
      STRONGEST,
      job.sentence(),
      size=size,
      motion=TINY.motion,
      articulation=TINY.articulation,
      zoom=TINY.zoom,
      max_seconds=SECONDS,
    )
    for emotion in EMOTIONS
  }
  return job.identity, clips


def enlarge(frames: np.ndarray) -> np.ndarray:
  """uint8 `[N, H, W, 3]` to `[N, H', W', 3]`."""
  height, width = frames.shape[1] * ENLARGEMENT, frames.shape[2] * ENLARGEMENT
  images = [Image.fromarray(frame) for frame in frames]
  bicubic = Image.Resampling.BICUBIC
  return np.stack([np.asarray(x.resize((width, height), bicubic)) for x in images])


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
  """Prints when a stage begins, and how long it took."""
  print(f'\n== {name}', flush=True)
  started = time.monotonic()
  yield
  print(f'== {name}: {time.monotonic() - started:.0f} s', flush=True)


def print_report(scores: Scores, minutes: float, folder: pathlib.Path) -> None:
  """Prints the scores, and where everything is."""
  print(f'\n{"":21}{"emotion recognised (asked)":62} lip-sync correlation')
  for name, measured in scores.items():
    pairs = zip(measured['recognised'], measured['asked'])
    seen = ', '.join(f'{recognised} ({asked})' for recognised, asked in pairs)
    print(f'  {name:18} {seen:62} {np.mean(measured["lip_sync"]):.2f}')
  generated = scores['generated']
  pairs = zip(generated['recognised'], generated['asked'])
  right = sum(recognised == asked for recognised, asked in pairs)
  print(f'\n{right} of {len(EMOTIONS)} emotions recognised; {minutes} minutes')
  print(f'videos:        {folder}/<emotion>.mp4, {folder}/<emotion>_beside_truth.mp4')
  print(f'contact sheet: {folder / "sheet.png"}')
  print(
    f'try it:        python -m dicetalk_jax.generate --model={folder}/model '
    f'--image={folder}/portrait.png --audio={folder}/speech.wav --emotion=surprised '
    '--output=out.mp4'
  )


if __name__ == '__main__':
  with one_sentence():
    main()

"""The demo: from nothing to a talking face, `make demo` or `python -m examples.demo
--folder=demo`.

Generates the synthetic data set, trains the three tiny tasks for a short while, lets
one person whom training never saw say one sentence that it never heard in four
emotions, and measures the result against the exact truth. The tiny models show that
every part works together; they say nothing about the quality of the published weights.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import sys
import time

import numpy as np
import soundfile

from dicetalk_jax.errors import one_sentence

EMOTIONS = ('happy', 'angry', 'sad', 'surprised')
TASKS = ('autoencoder', 'embedder', 'diffusion')
SECONDS = 2.4
COLUMNS = 9  # of the contact sheet


def smallest(config) -> None:
  """Cuts a tiny configuration down to what shows that everything runs; the result
  looks like noise.
  """
  config.total_steps = config.eval_every = config.checkpoint_every = {
    'embedder': 20
  }.get(config.task, 10)
  config.log_every = 5
  config.optim.name, config.optim.warmup = 'adam', 2  # Muon compiles for minutes


def _share_cores() -> None:
  """Devices for the data axis: on CPUs, the diffusion step is faster with a part of
  the batch on each core.
  """
  import jax

  jax.config.update(
    'jax_num_cpu_devices', min(4, 1 << (os.cpu_count() or 1).bit_length() - 1)
  )


def prepare(folder: pathlib.Path, small: bool) -> None:
  """Renders the synthetic data set, or finds it where it was rendered before."""
  from data_pipelines.builders.synthetic import prepare_synthetic
  from data_pipelines.builders.synthetic_clips import TINY

  settings = TINY
  if small:
    settings = dataclasses.replace(TINY, train=4, val=2, clips=16)
  with _stage('rendering the data set'):
    prepare_synthetic(folder / 'data', settings)


def train(folder: pathlib.Path, small: bool) -> None:
  """Runs the three tasks one after the other, each with the model of the one before,
  and packs the last model.
  """
  from dicetalk_jax import main, model_references
  from dicetalk_jax.training import loop

  model = ''
  for task in TASKS:
    config = importlib.import_module(f'configs.{task}').get_config('tiny')
    if small:
      smallest(config)
    config.model = str(model)
    with _stage(f'training the {task}, {config.total_steps} steps'):
      loop.train(main.task_class(task), config, folder / task)
    model = folder / task / 'model'
  model_references.pack(model, folder / 'model', overwrite=True)


def scenes(size: int) -> tuple[int, list]:
  """The held-out person, and (emotion, truth) of one held-out sentence as the data
  set would render it.
  """
  from data_pipelines.builders.synthetic_clips import TINY, SyntheticConfig, jobs
  from data_pipelines.synthetic.clip import make_clip

  job = jobs(SyntheticConfig(test=1), 'test')[0]

  def perform(emotion):
    return make_clip(
      job.identity,
      emotion,
      3,
      job.sentence(),
      size=size,
      motion=TINY.motion,
      articulation=TINY.articulation,
      zoom=TINY.zoom,
      max_seconds=SECONDS,
    )

  return job.identity, [(emotion, perform(emotion)) for emotion in EMOTIONS]


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(
    prog='examples.demo', description=__doc__.split('\n')[0]
  )
  parser.add_argument(
    '--folder', default='demo', type=pathlib.Path, help='everything is written here'
  )
  parser.add_argument(
    '--smallest',
    action='store_true',
    help='a few steps only: checks that all parts run',
  )
  args = parser.parse_args(argv)
  args.folder.mkdir(parents=True, exist_ok=True)
  _share_cores()
  started = time.monotonic()
  prepare(args.folder, args.smallest)
  train(args.folder, args.smallest)
  with _stage('generating'):
    report = generate(args.folder)
  report['minutes'] = round((time.monotonic() - started) / 60, 1)
  (args.folder / 'report.json').write_text(json.dumps(report, indent=2) + '\n')
  _print(report, args.folder)


def generate(folder: pathlib.Path) -> dict:
  """Writes portrait, sounds, videos and the contact sheet; returns what was
  measured.
  """
  from data_pipelines.builders.synthetic_clips import TINY
  from data_pipelines.synthetic.clip import make_portrait
  from dicetalk_jax.media import contact_sheet, video
  from dicetalk_jax.metrics.face_probe import crop_faces
  from dicetalk_jax.pipeline import Pipeline

  pipe = Pipeline.load(folder / 'model')
  size = pipe.settings.image_size
  identity, truths = scenes(size)
  portrait, box = make_portrait(identity, 4 * size, zoom=TINY.zoom)
  contact_sheet.save_image(folder / 'portrait.png', portrait)
  x0, y0, x1, y1 = box * 4 * size
  reference = crop_faces(portrait[None], box)
  rows, scores, panels = [], {}, []
  probe = _probe(folder, size)
  for emotion, truth in truths:
    frames, fps = pipe.generate(
      portrait,
      truth.audio,
      emotion=emotion,
      face_box=(x0, y0, x1 - x0, y1 - y0),
      seed=1,
      interpolate=False,
    )
    real = truth.frames[::2][: len(frames)]
    frames = frames[: len(real)]
    box_of = truth.bbox[: 2 * len(real) : 2].mean(0)
    coded = pipe.reconstruct(real)
    for name, clip in (
      ('generated', frames),
      ('truth', real),
      ('autoencoded truth', coded),
    ):
      scores.setdefault(name, []).append(
        _score(
          probe, clip, box_of, reference, emotion, truth.opening[::2][: len(real)], fps
        )
      )
    shown = np.linspace(0, len(real) - 1, COLUMNS).round().astype(int)
    rows += [
      (f'{emotion}: truth', list(real[shown])),
      (f'{emotion}: generated', list(frames[shown])),
    ]
    panels.append(
      contact_sheet.side_by_side(
        [_enlarged(real), _enlarged(frames)], [f'{emotion}: truth', 'generated']
      )
    )
    video.write_video(
      folder / f'{emotion}.mp4', _enlarged(frames), fps, audio=truth.audio
    )
    video.write_video(
      folder / f'{emotion}_beside_truth.mp4', panels[-1], fps, audio=truth.audio
    )
  contact_sheet.contact_sheet(
    rows, [f'{t / fps:.1f} s' for t in shown], scale=2, path=folder / 'sheet.png'
  )
  soundfile.write(folder / 'speech.wav', truths[0][1].audio, 16_000)
  return {
    name: {key: [s[key] for s in values] for key in values[0]}
    for name, values in scores.items()
  }


def _probe(folder: pathlib.Path, size: int):
  """A measuring device fitted to rendered training faces; it shares nothing with the
  models it judges.
  """
  from dicetalk_jax.data import clip_record
  from dicetalk_jax.data.clip_source import ClipSource
  from dicetalk_jax.metrics.face_probe import FaceProbe, crop_faces

  source = ClipSource(
    next(p.parent for p in (folder / 'data').rglob('dataset_info.json')), 'train'
  )
  neutral, crops, references, emotions, openings = {}, [], [], [], []
  table = source.table
  for i in sorted(
    range(len(source)), key=lambda i: (table.identity[i], table.emotion[i] != 'neutral')
  ):
    record = source[i]
    if (
      table.identity[i] not in neutral
    ):  # clips are in order: the first of a person is neutral
      closed = [int(record['opening'].argmin())]
      neutral[table.identity[i]] = crop_faces(
        clip_record.decode_frames(record, closed), record['bbox'].mean(0)
      )
    rows = np.arange(2, len(record['frames']), 6)
    crops.append(
      crop_faces(clip_record.decode_frames(record, rows), record['bbox'].mean(0))
    )
    references.append(np.repeat(neutral[table.identity[i]], len(rows), axis=0))
    emotions += [clip_record.EMOTIONS.index(table.emotion[i])] * len(rows)
    openings += list(record['opening'][rows])
  return FaceProbe.fit(
    np.concatenate(crops),
    np.array(emotions),
    np.array(openings),
    np.concatenate(references),
  )


def _score(probe, frames, box, reference, emotion, opening, fps) -> dict:
  from dicetalk_jax.data.clip_record import EMOTIONS as ALL
  from dicetalk_jax.metrics.face_probe import crop_faces
  from dicetalk_jax.metrics.lip_sync import lip_sync

  crops = crop_faces(frames, box)
  probabilities = probe.emotion(crops, reference).mean(0)
  return {
    'asked': emotion,
    'recognised': ALL[int(probabilities.argmax())],
    'lip_sync': round(
      lip_sync(probe.opening(crops, reference), opening, fps).correlation, 3
    ),
  }


def _enlarged(frames: np.ndarray, factor: int = 4) -> np.ndarray:
  from PIL import Image

  height, width = frames.shape[1] * factor, frames.shape[2] * factor
  return np.stack(
    [
      np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC))
      for f in frames
    ]
  )


@contextlib.contextmanager
def _stage(name: str):
  print(f'\n== {name}', flush=True)
  started = time.monotonic()
  yield
  print(f'== {name}: {time.monotonic() - started:.0f} s', flush=True)


def _print(report: dict, folder: pathlib.Path) -> None:
  print(
    '\n                     emotion recognised (asked)                                '
    'lip-sync correlation'
  )
  for name in ('generated', 'truth', 'autoencoded truth'):
    s = report[name]
    seen = ', '.join(
      f'{got} ({asked})' for got, asked in zip(s['recognised'], s['asked'])
    )
    print(f'  {name:18} {seen:62} {np.mean(s["lip_sync"]):.2f}')
  right = sum(
    a == b
    for a, b in zip(report['generated']['asked'], report['generated']['recognised'])
  )
  print(
    f'\n{right} of {len(EMOTIONS)} emotions recognised; {report["minutes"]} minutes'
  )
  print(f'videos:        {folder}/<emotion>.mp4, {folder}/<emotion>_beside_truth.mp4')
  print(f'contact sheet: {folder / "sheet.png"}')
  print(
    'try it:        python -m dicetalk_jax.generate '
    f'--model={folder}/model --image={folder}/portrait.png --audio={folder}/speech.wav '
    '--emotion=surprised --output=out.mp4'
  )


if __name__ == '__main__':
  with one_sentence():
    main(sys.argv[1:])

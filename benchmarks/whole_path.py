"""Walks the path of docs/training.md at full width, on imitated corpora.

  python -m benchmarks.whole_path FOLDER

Writes random files in the published layout and a few rendered clips in the layouts of
MEAD and HDTF, converts and prepares them, trains the embedder and then the adapters of
the diffusion model for two steps each under `paper_strict`, and generates a video, all
by the commands themselves. Prints time and peak memory of each. Images have 64 pixels,
windows 4 frames, sampling takes 2 steps, and there is no EMA; all else has its full
size. The result means nothing: no weight is a real one. Needs about 20 GB of memory
and of disk. Linux only.
"""

import argparse
import pathlib

import torch

from benchmarks import imitated_corpora, published_files
from benchmarks.processes import run_module
from dicetalk_jax.data.clip_source import data_sets

SECONDS = 1.0  # of a clip
SIZE = 64  # pixels
# Two people in two emotions, and two videos: what the imitated corpora have.
GROUPS = ('identities=2', 'emotions=2', 'clips=2', 'videos=2', 'min_len=8')


def report(command: str, *args: object) -> None:
  """Runs a command; prints its time and its peak of memory."""
  usage = run_module(command, *args)
  print(
    f'>>> {command}: {usage.seconds:.0f} s, peak of own memory {usage.own / 1e9:.2f} '
    f'GB, with pages of mapped files {usage.with_files / 1e9:.2f} GB',
    flush=True,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description='Walks the path of training.')
  parser.add_argument('folder', type=pathlib.Path, help='everything is written here')
  folder = parser.parse_args().folder
  downloads = folder / 'downloads'
  expressions = folder / 'expressions'
  base = folder / 'models' / 'svd'
  data = folder / 'data'
  runs = folder / 'runs'

  # 1. What a user would have: downloads and corpora
  downloads.mkdir(parents=True)
  published_files.write_bases(downloads, torch.float16)
  imitated_corpora.write_mead(folder / 'mead', expressions, SECONDS)
  imitated_corpora.write_hdtf(folder / 'hdtf', expressions, SECONDS)
  imitated_corpora.write_portrait_and_speech(folder, SECONDS)

  # 2. A model folder, and data sets
  svd = downloads / 'svd'
  report('convert', 'svd', svd, base, '--whisper', downloads / 'whisper')
  for corpus in ('mead', 'hdtf'):
    report(
      'data_pipelines.prepare',
      corpus,
      f'--root={folder / corpus}',
      f'--out={data}',
      f'--expression={expressions}',
      f'--size={SIZE}',
      *imitated_corpora.FLAGS,
    )
  sets = ','.join(map(str, data_sets(data)))

  # 3. Two steps of each run
  common = (
    f'--config.data.dir={data}',
    f'--config.data.dataset={sets}',
    '--config.total_steps=2',
    '--config.dtype=float32',  # CPUs are slow in bfloat16
    '--notensorboard',
  )
  report(
    'dicetalk_jax.main',
    '--config=configs/embedder.py:paper_strict',
    f'--config.model={base}',
    f'--workdir={runs / "embedder"}',
    *common,
    *(f'--config.data.{setting}' for setting in GROUPS),
    '--config.batch_size=12',
  )
  embedder = runs / 'embedder' / 'model'
  report('data_pipelines.precompute', f'--model={embedder}', f'--data={data}')
  report(
    'dicetalk_jax.main',
    '--config=configs/diffusion.py:paper_strict',
    f'--config.model={embedder}',
    f'--config.init_from={base}',
    f'--workdir={runs / "diffusion"}',
    *common,
    "--config.trainable=('adapters',)",
    f'--config.data.size={SIZE}',
    '--config.data.frames=4',
    '--config.batch_size=1',
    '--config.sample.num_steps=2',
    '--config.optim.ema=0',
  )

  # 4. A video
  report(
    'dicetalk_jax.generate',
    f'--model={runs / "diffusion" / "model"}',
    f'--image={folder / "portrait.png"}',
    f'--audio={folder / "speech.wav"}',
    '--emotion=happy',
    '--face_box=20,10,78,90',
    f'--output={folder / "out.mp4"}',
  )


if __name__ == '__main__':
  main()

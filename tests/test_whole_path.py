"""The path of docs/training.md, from corpora to a video, by the commands themselves, at
a small width; and the messages that lead along it.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from benchmarks import imitated_corpora
from dicetalk_jax import bundle
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.media.video import read_video
from tests.convert import published_folders
from tests.training import micro

pytestmark = pytest.mark.slow  # see tests/durations.md

ROOT = pathlib.Path(__file__).parents[1]
SECONDS = 2.0
SIZE = 32

# Runs commands, each in a fork: imports are shared, flags can be parsed only once. A
# word of a command may name what an earlier one printed last: {mead}.
DRIVER = """
import json, os, runpy, sys
import data_pipelines.builders.corpus, convert.__main__
import dicetalk_jax.pipeline
import dicetalk_jax.training.diffusion, dicetalk_jax.training.embedder
import dicetalk_jax.training.loop, tensorflow_datasets
folder, commands = sys.argv[1], json.loads(sys.argv[2])
last = {}
for name, (module, *words) in commands.items():
  out = os.path.join(folder, name)
  words = [word.format(**last) for word in words]
  child = os.fork()
  if not child:
    for number, end in ((1, '.out'), (2, '.err')):
      os.dup2(os.open(out + end, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name='__main__', alter_sys=True)
    os._exit(0)
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  lines = open(out + '.out').read().split()
  last[name] = lines[-1] if lines else ''
  print(json.dumps([name, code]), flush=True)
"""

MAIN = 'dicetalk_jax.main'
FULL_SIZE = '--config=configs/diffusion.py'
NARROW = '--config=tests/narrow.py:{}:paper_strict'


def commands(place):
  """The commands, by name; those called `ask_...` lack something."""
  data = f'--config.data.dir={place}/data'
  prepare = (f'--out={place}/data', f'--size={SIZE}', *imitated_corpora.FLAGS)
  embedder = [
    NARROW.format('embedder'),
    '--notensorboard',
    data,
    f'--config.model={place}/models/svd',
    f'--workdir={place}/runs/embedder',
  ]
  diffusion = [
    '--notensorboard',
    data,
    f'--workdir={place}/runs/diffusion',
    f'--config.model={place}/runs/embedder/model',
    f'--config.init_from={place}/models/svd',
  ]
  corpora = '--config.data.dataset={mead},{hdtf}'
  return {
    # As typed on a fresh machine, and then with what each message asks for.
    'ask_workdir': [MAIN, FULL_SIZE],
    'ask_model': [MAIN, FULL_SIZE, *diffusion[:3]],
    'ask_model_folder': [MAIN, FULL_SIZE, *diffusion[:4]],
    'svd': [
      'convert',
      'svd',
      f'{place}/downloads/svd',
      f'{place}/models/svd',
      f'--whisper={place}/downloads/whisper',
    ],
    'ask_data': [MAIN, *embedder],
    **{
      corpus: [
        'data_pipelines.prepare',
        corpus,
        f'--root={place}/corpora/{corpus}',
        f'--expression={place}/expressions',
        *prepare,
      ]
      for corpus in ('mead', 'hdtf')
    },
    'ask_corpora': [MAIN, *embedder, '--config.data.dataset={mead}'],
    'embedder': [MAIN, *embedder, corpora],
    'precompute': [
      'data_pipelines.precompute',
      f'--model={place}/runs/embedder/model',
      f'--data={place}/data',
    ],
    'ask_start': [MAIN, FULL_SIZE, *diffusion[:4]],
    'diffusion': [
      MAIN,
      NARROW.format('diffusion'),
      "--config.trainable=('adapters',)",
      corpora,
      *diffusion,
    ],
    'generate': [
      'dicetalk_jax.generate',
      f'--model={place}/runs/diffusion/model',
      f'--image={place}/portrait.png',
      f'--audio={place}/speech.wav',
      '--emotion=happy',
      '--face_box=20,10,78,90',
      f'--output={place}/out.mp4',
    ],
  }


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """Everything that the commands read and wrote."""
  place = tmp_path_factory.mktemp('path')
  for write in (imitated_corpora.write_mead, imitated_corpora.write_hdtf):
    corpus = write.__name__.removeprefix('write_')
    write(place / 'corpora' / corpus, place / 'expressions', SECONDS)
  imitated_corpora.write_portrait_and_speech(place, SECONDS)
  published_folders.save_svd(place / 'downloads/svd')
  published_folders.save_whisper(place / 'downloads/whisper')
  before = micro.digests(place / 'downloads')
  result = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', DRIVER, place, json.dumps(commands(place))],
    cwd=ROOT,
    env=os.environ
    | {
      'PYTHONPATH': str(ROOT),
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # compiles in half the time
      'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
    },
    text=True,
    capture_output=True,
    timeout=3000,
  )
  codes = dict(map(json.loads, result.stdout.splitlines()))
  assert codes.keys() == commands(place).keys(), result.stderr
  assert micro.digests(place / 'downloads') == before  # as they were downloaded
  (place / 'codes.json').write_text(json.dumps(codes))
  return place


def said(place, name):
  return (place / f'{name}.err').read_text()


@pytest.mark.parametrize(
  'name', [name for name in commands('') if not name.startswith('ask_')]
)
def test_every_command_succeeds(place, name):
  codes = json.loads((place / 'codes.json').read_text())
  assert codes[name] == 0, said(place, name)


@pytest.mark.parametrize(
  ('name', 'next_step'),
  [
    ('ask_workdir', '--workdir=runs/diffusion'),
    ('ask_model', 'configs/embedder.py), such as --config.model=runs/embedder/model'),
    ('ask_model_folder', 'runs/embedder/model is not a model folder'),
    ('ask_data', 'data_pipelines.prepare and name the folder that it prints in'),
    ('ask_corpora', "config.data.corpora=('mead', 'hdtf')"),
    ('ask_start', 'convert svd FOLDER models/svd'),
  ],
)
def test_each_message_leads_to_the_next_step(place, name, next_step):
  codes = json.loads((place / 'codes.json').read_text())
  lines = said(place, name).strip().splitlines()
  assert codes[name] == 2 and len(lines) == 1, lines
  assert lines[0].startswith('error: ') and next_step in lines[0]


def test_the_prepared_data_set_knows_its_videos_on_youtube(place):
  folder = (place / 'hdtf.out').read_text().split()[-1]
  found = {name for split in ('train', 'val') for name in youtube_ids(folder, split)}
  assert found == set(imitated_corpora.HDTF_VIDEOS.values())


def youtube_ids(folder, split):
  return ClipSource(folder, split).youtube_ids


def test_the_path_ends_in_a_video(place):
  video = read_video(place / 'out.mp4')
  assert video.fps == 12.5 and len(video.frames) == 12.5 * SECONDS
  assert video.frames.shape[1:] == (SIZE, SIZE, 3)


def test_the_run_learned_from_both_corpora_and_froze_the_rest(place):
  rows = (place / 'runs/diffusion/metrics.jsonl').read_text()
  assert re.findall(r'"step": (\d)', rows)[:2] == ['1', '2']
  _, start = bundle.load_component(place / 'models/svd', 'unet')
  _, trained = bundle.load_component(place / 'runs/diffusion/model', 'unet')
  changed = {name for name, x in start.items() if (x != trained[name]).any()}
  assert not changed and trained.keys() - start.keys()
  assert {'happy', 'happy_1', 'happy_3', 'sad'} <= set(
    bundle.emotions(place / 'runs/diffusion/model')
  )

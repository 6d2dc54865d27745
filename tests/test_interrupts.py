"""Ctrl-C and SIGTERM in real processes: one line, exit code, nothing half-written."""

import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

from PIL import Image
import pytest

from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import SyntheticConfig
from tests import interrupted, tiny
from tests.convert import published_folders
from tests.data_pipelines import made_clips

ROOT = pathlib.Path(__file__).parents[1]
# Bars, and what TFDS always says.
PROGRESS = re.compile(r'\d+%\||it/s\]|Using custom data configuration')
LINE = 'interrupted; run the same command again'
# What each command does when it is interrupted.
CASES = {
  'generate': dict(
    module='dicetalk_jax.generate',
    argv=[
      '--model={root}/model',
      '--image={root}/face.png',
      '--audio={root}/speech.wav',
      '--emotion=happy',
      '--face_box=12,10,52,54',
      '--output={root}/new/out.mp4',
    ],
    held='renaming of a video',
  ),
  'embed': dict(
    module='dicetalk_jax.embed',
    argv=[
      '--model={root}/embedding',
      '--audio={root}/speech.wav',
      '--output={root}/prior.npy',
    ],
    held='dicetalk_jax.component:Component.load',
  ),
  'dataset_priors': dict(
    module='dicetalk_jax.dataset_priors',
    argv=['--model={root}/embedding', '--data={root}/data'],
    held='dicetalk_jax.component:Component.load',
  ),
  'precompute': dict(
    module='data_pipelines.precompute',
    argv=['--model={root}/embedding', '--data={root}/data', '--features=whisper'],
    held='renaming',
  ),
  'pack': dict(
    module='dicetalk_jax.pack',
    argv=['--model={root}/model', '--output={root}/packed'],
    held='dicetalk_jax.bundle:save_settings',
  ),
  'convert': dict(
    module='convert.__main__',
    argv=['whisper', '{root}/whisper', '{root}/converted'],
    held='dicetalk_jax.bundle:save_component',
  ),
  'prepare, workers': dict(
    module='data_pipelines.prepare',
    argv=[
      'folder',
      '--root={root}/corpus',
      '--out={root}/prepared',
      '--size=32',
      '--min_seconds=.4',
      '--detector=tests.interrupted:stuck',
      '--workers=2',
    ],
    held='',
  ),
  'prepare, writing': dict(
    module='data_pipelines.prepare',
    argv=['synthetic', '--out={root}/rendered', '--workers=1', '--tiny'],
    held='data_pipelines.builders.synthetic_clips:render',
  ),
  'main': dict(
    module='dicetalk_jax.main',
    argv=[
      f'--config={ROOT}/configs/embedder.py:tiny',
      '--workdir={root}/run',
      '--notensorboard',
    ],
    held='task',
  ),
}
CASES['pack, terminated'] = CASES['pack'] | dict(signal=signal.SIGTERM)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Whatever the commands read."""
  root = tmp_path_factory.mktemp('root')
  tiny.save_model(root / 'model')
  embedding = {'embedder': tiny.EMBEDDER, 'whisper': tiny.CONFIGS['whisper']}
  tiny.save_components(root / 'embedding', embedding)
  Image.fromarray(tiny.portrait()).save(root / 'face.png')
  tiny.write_speech(root / 'speech.wav')
  published_folders.save_whisper(root / 'whisper')
  for name in ('p', 'q'):
    made_clips.write(root / 'corpus' / name / 'a.mp4', 0.6)
  config = SyntheticConfig(size=16, train=1, val=1, test=0, clips=1, seconds=0.4)
  prepare_synthetic(root / 'data', config, workers=1)
  return root


def contents(root: pathlib.Path) -> dict[str, str]:
  """Digests of all files, by path."""
  return {
    str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in root.rglob('*')
    if path.is_file()
  }


@pytest.fixture(scope='module')
def outcomes(root, tmp_path_factory):
  before = contents(root)
  cases = {
    name: case | dict(argv=[text.format(root=root) for text in case['argv']])
    for name, case in CASES.items()
  }
  path = tmp_path_factory.mktemp('cases') / 'cases.json'
  path.write_text(json.dumps(cases))
  env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  result = subprocess.run(
    [sys.executable, '-W', 'ignore', '-m', interrupted.__name__, path],
    cwd=ROOT,
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    check=True,
  )
  after = contents(root)
  assert {path: after.get(path) for path in before} == before
  return json.loads(result.stdout), after.keys() - before.keys()


@pytest.mark.parametrize('name', CASES)
def test_a_stopped_command_says_so_in_one_line(outcomes, name):
  outcome = outcomes[0][name]
  assert outcome['waited'], outcome['err']
  line = LINE
  code = 130
  if 'signal' in CASES[name]:
    line = LINE.replace('interrupted', 'terminated')
    code = 143
  *before, last = outcome['err'].replace('\r', '\n').splitlines()
  assert (outcome['code'], last) == (code, line)
  said = [text for text in before if text and not PROGRESS.search(text)]
  assert not said


def test_stopped_commands_leave_nothing_half_written(outcomes):
  """A run's own notes and finished clips stay for the next run; they are whole."""
  left = {path for path in outcomes[1] if not path.startswith('run/')}
  assert left == set()


@pytest.mark.parametrize(
  'module', ['dicetalk_jax.generate', 'data_pipelines.prepare', 'convert']
)
def test_imports_are_interrupted_in_one_line(tmp_path, module):
  slow = 'import time; print("waiting", flush=True); time.sleep(600)'
  for name in ('jax', 'numpy'):
    (tmp_path / f'{name}.py').write_text(slow)
  process = subprocess.Popen(
    [sys.executable, '-m', module],
    text=True,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  assert process.stdout.readline() == 'waiting\n'
  process.send_signal(signal.SIGINT)
  _, err = process.communicate()
  assert err == f'{LINE}\n'
  # Python may end itself by the signal, which a shell reports as 130.
  assert process.returncode in (130, -signal.SIGINT)


@pytest.fixture
def in_one_step():
  """Starts a process whose main thread never returns to Python, with other times."""
  processes = []

  def start(grace: float, same: float) -> subprocess.Popen:
    script = (
      'import hashlib\n'
      'from dicetalk_jax import interrupt\n'
      f'interrupt.GRACE, interrupt.SAME = {grace}, {same}\n'
      'with interrupt.ends_with_one_line():\n'
      '  print("waiting", flush=True)\n'
      '  hashlib.pbkdf2_hmac("sha512", b"", b"", 2**31 - 1)'
    )
    process = subprocess.Popen(
      [sys.executable, '-c', script],
      text=True,
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    processes.append(process)
    assert process.stdout.readline() == 'waiting\n'
    return process

  yield start
  for process in processes:
    process.kill()
    process.communicate()


def test_a_step_that_takes_long_is_not_waited_for(in_one_step):
  process = in_one_step(grace=0.1, same=0.0)
  process.send_signal(signal.SIGINT)
  assert process.communicate() == ('', f'{LINE}\n')
  assert process.returncode == 130


def test_an_ignored_signal_stays_ignored():
  script = (
    'import signal\n'
    'from dicetalk_jax import interrupt\n'
    'signal.signal(signal.SIGINT, signal.SIG_IGN)\n'
    'with interrupt.ends_with_one_line():\n'
    '  signal.raise_signal(signal.SIGINT)\n'
    '  print("goes on")'
  )
  result = subprocess.run(
    [sys.executable, '-c', script], cwd=ROOT, text=True, capture_output=True
  )
  assert (result.returncode, result.stdout, result.stderr) == (0, 'goes on\n', '')


def test_a_second_signal_ends_a_process_that_is_cleaning_up(in_one_step):
  process = in_one_step(grace=600.0, same=0.0)
  process.send_signal(signal.SIGTERM)
  assert process.stderr.readline() == 'terminated; run the same command again\n'
  process.send_signal(signal.SIGINT)
  assert process.wait() == 143

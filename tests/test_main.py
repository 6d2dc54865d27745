"""Mistakes on the command line end with exit code 2 and one sentence."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TINY = '--config=configs/embedder.py:tiny'
WORKDIR = '--workdir=unused'

# name -> (arguments, what the sentence says)
MISTAKES = {
  'no config': ([WORKDIR], '--config is missing'),
  'no workdir': ([TINY], '--workdir is missing'),
  'no such file': (['--config=configs/nope.py', WORKDIR], 'configs/nope.py'),
  'no such file, with override': (
    ['--config=configs/nope.py', '--config.seed=1', WORKDIR],
    'configs/nope.py',
  ),
  'no such preset': (
    ['--config=configs/embedder.py:huge', WORKDIR],
    "unknown preset 'huge'",
  ),
  'unknown key': ([TINY, '--config.optim.lrr=1', WORKDIR], 'Did you mean "lr"'),
  'unknown parent': ([TINY, '--config.nope.lr=1', WORKDIR], "'nope'"),
  'wrong type': ([TINY, '--config.total_steps=many', WORKDIR], 'total_steps=many'),
  'unknown flag': ([TINY, '--wordir=unused'], 'workdir'),
  'stray argument': ([TINY, WORKDIR, 'stray'], "'stray'"),
  'unknown task': (
    [TINY, '--config.task=dance', WORKDIR],
    'autoencoder, embedder, diffusion',
  ),
  'no cluster': ([TINY, '--config.multihost=True', WORKDIR], 'multihost=False'),
}

# Each case in a fork: flags can be parsed only once, and imports are shared.
DRIVER = """
import json, os, sys
from dicetalk_jax import main
for name, arguments in json.loads(sys.argv[1]).items():
  sys.stderr.write(f'== {name}\\n')
  sys.stderr.flush()
  child = os.fork()
  if not child:
    sys.argv = ['main', *arguments]
    main.run()
  sys.stderr.write(f'code {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\\n')
"""


def run(*command):
  env = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  return subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    env=env,
    text=True,
    capture_output=True,
    timeout=120,
  )


@pytest.fixture(scope='module')
def outcomes():
  result = run(
    '-W',
    'ignore',
    '-c',
    DRIVER,
    json.dumps({name: arguments for name, (arguments, _) in MISTAKES.items()}),
  )
  assert result.stdout == ''
  return {
    name: lines
    for name, *lines in (
      part.strip().split('\n') for part in result.stderr.split('== ')[1:]
    )
  }


@pytest.mark.parametrize('name', MISTAKES)
def test_mistake_is_one_sentence(outcomes, name):
  sentence, code = outcomes[name]
  assert code == 'code 2'
  assert sentence.startswith('error: ') and MISTAKES[name][1] in sentence
  assert not (ROOT / 'unused').exists()


def test_no_arguments_show_the_help():
  """The same as `--help`: every flag with its default."""
  bare = run('-m', 'dicetalk_jax.main')
  asked = run('-m', 'dicetalk_jax.main', '--help')
  assert bare.returncode == 2 and bare.stdout == ''
  assert bare.stderr.strip() in asked.stdout
  flags = re.findall(
    r'^  --(\S+): \S.*?\(default: ', bare.stderr, re.DOTALL | re.MULTILINE
  )
  assert sorted(flags) == [
    '[no]tensorboard',
    'config',
    'coordinator',
    'process',
    'processes',
    'profile',
    'workdir',
  ]


def test_an_installed_script_shows_the_same_help():
  code = 'from dicetalk_jax import main; main.run()'
  assert '--[no]tensorboard' in run('-c', code).stderr


def test_a_missing_extra_is_named_before_anything_is_computed(tmp_path):
  code = "import sys; sys.modules['tensorflow'] = None; from dicetalk_jax import main; "
  workdir = tmp_path / 'run'
  result = run('-c', code + 'main.run()', TINY, f'--workdir={workdir}')
  assert result.returncode == 2
  assert "pip install 'dicetalk-jax[train]', or add --notensorboard" in result.stderr
  assert len(result.stderr.splitlines()) == 1
  assert not workdir.exists()

"""Where commands keep compiled programs."""

import os
import subprocess
import sys

import jax
import pytest

from dicetalk_jax import compiled, dataset_priors, embed, generate
from dicetalk_jax.errors import Note, UserError

OPTIONS = (
  'jax_compilation_cache_dir',
  'jax_enable_compilation_cache',
  'jax_persistent_cache_min_compile_time_secs',
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
  """Jax as a command finds it, and a user without anything."""
  before = {name: getattr(jax.config, name) for name in OPTIONS}
  jax.config.update('jax_compilation_cache_dir', None)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1)
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setenv('HOME', str(tmp_path))
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_programs_are_kept_in_the_cache_folder_of_the_user(monkeypatch, tmp_path):
  compiled.keep_programs()
  folder = tmp_path / '.cache/dicetalk_jax'
  assert jax.config.jax_compilation_cache_dir == str(folder)
  assert folder.is_dir()
  assert jax.config.jax_persistent_cache_min_compile_time_secs == compiled.SHORTEST

  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'else'))
  assert compiled.default_folder() == tmp_path / 'else/dicetalk_jax'


@pytest.mark.parametrize('chosen', ['/somewhere', ''])
def test_the_choice_of_the_user_stays(chosen, tmp_path):
  """An empty folder is JAX's way of keeping nothing."""
  jax.config.update('jax_compilation_cache_dir', chosen)
  compiled.keep_programs()
  assert jax.config.jax_compilation_cache_dir == chosen
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 1
  assert not [*tmp_path.iterdir()]


def test_a_cache_that_is_turned_off_makes_no_folder(tmp_path):
  jax.config.update('jax_enable_compilation_cache', False)
  compiled.keep_programs()
  assert jax.config.jax_compilation_cache_dir is None
  assert not [*tmp_path.iterdir()]


def test_without_a_place_to_write_to_a_note_says_so(monkeypatch, tmp_path):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  with pytest.warns(Note, match='JAX_COMPILATION_CACHE_DIR'):
    compiled.keep_programs()
  assert jax.config.jax_compilation_cache_dir is None


def test_programs_of_a_command_are_found_by_the_next(tmp_path):
  """In processes of their own; a model folder is never written to."""
  code = (
    'import jax, jax.numpy as jnp; from dicetalk_jax import compiled;'
    'compiled.SHORTEST = 0; compiled.keep_programs();'
    'jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((9, 9)))'
  )
  environment = {
    name: value for name, value in os.environ.items() if not name.startswith('JAX_')
  }
  environment |= {'HOME': str(tmp_path), 'JAX_PLATFORMS': 'cpu'}
  stored = []
  for _ in range(2):
    subprocess.run([sys.executable, '-c', code], env=environment, check=True)
    folder = tmp_path / '.cache/dicetalk_jax'
    stored.append({path.name for path in folder.glob('*-cache')})
  assert stored[0] and stored[0] == stored[1]


@pytest.mark.parametrize(
  'command, flags',
  [
    (generate, ('image', 'audio', 'emotion', 'output')),
    (embed, ('audio',)),
    (dataset_priors, ('data',)),
  ],
)
def test_commands_keep_programs(command, flags, tmp_path):
  """From the start, before a detector of faces is compiled."""
  argv = [f'--{name}={tmp_path / "nothing"}' for name in ('model', *flags)]
  with pytest.raises(UserError):
    command.main(argv)
  assert jax.config.jax_compilation_cache_dir is not None

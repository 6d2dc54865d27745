r"""Trains a model: a configuration file and a work directory make a run.

  python -m dicetalk_jax.main --config=configs/embedder.py:tiny \
      --config.model=runs/vae/model --workdir=runs/embedder

The same command resumes the run. Presets follow the colon and can be combined; each
configuration file lists its own. Any value can be overridden:

  --config.optim.lr=3e-4
  --config.model=DIR          the model folder with the frozen components
  --config.multihost=True     one of several processes that train together

Any option of jax is a flag, too. Compiled programs are kept for the next run, in
~/.cache/dicetalk_jax or --jax_compilation_cache_dir=DIR.
"""

import importlib
import importlib.util
import os
import re
import sys
from typing import Any

from absl import app, flags, logging
from etils import epath
import jax
from ml_collections import config_flags

from dicetalk_jax import cli, orbax_paths, parallel
from dicetalk_jax.compiled import keep_programs
from dicetalk_jax.errors import ConfigError, InputError
from dicetalk_jax.training.profile import parse_span

# Imported when they are needed.
TASKS = {
  'autoencoder': 'dicetalk_jax.training.autoencoder:AutoencoderTask',
  'embedder': 'dicetalk_jax.training.embedder:EmbedderTask',
  'diffusion': 'dicetalk_jax.training.diffusion:DiffusionTask',
}

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  help_string='Configuration file, such as configs/diffusion.py, with presets after a '
  'colon.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  '',
  'Directory of the run, for checkpoints, metrics, images and the model. An existing '
  'run is resumed.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  '',
  'HOST:PORT of process 0, where no cluster provides it; or set '
  'JAX_COORDINATOR_ADDRESS. See docs/scale.md.',
)
_PROCESSES = flags.DEFINE_integer(
  'processes',
  0,
  'How many processes train together, where no cluster provides it; or set '
  'JAX_NUM_PROCESSES.',
)
_PROCESS = flags.DEFINE_integer(
  'process',
  -1,
  'Which of these processes this is, from 0; or set JAX_PROCESS_ID.',
)
_TENSORBOARD = flags.DEFINE_bool(
  'tensorboard', True, 'Write event files for TensorBoard into the work directory.'
)
_PROFILE = flags.DEFINE_string(
  'profile',
  '',
  'START:COUNT, the steps to profile, such as 20:5; written to profile/ in the work '
  'directory.',
)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line and loads the configuration.

  Raises:
    ConfigError: a mistake in either.
  """
  try:
    rest = flags.FLAGS(argv)
    if flags.FLAGS['verbosity'].using_default_value:
      logging.set_verbosity(logging.WARNING)  # libraries log much at INFO
    if _CONFIG.value is None:
      raise ConfigError(
        '--config is missing; for example --config=configs/diffusion.py:tiny'
      )
    _CONFIG.value.task  # noqa: B018, a file that cannot be read fails here
  except (OSError, SyntaxError, ImportError) as error:
    raise ConfigError(
      f'cannot read the configuration file: {_last_line(error)}; '
      'the repository has them in configs/'
    ) from error
  except (AttributeError, KeyError) as error:
    raise ConfigError(
      'the configuration has no such key: ' + '. '.join(_innermost(error).split('\n'))
    ) from error
  except flags.Error as error:
    raise ConfigError(_last_line(error)) from error
  return rest


def _innermost(error: Exception) -> str:
  """The message of an error that may wrap another one as its argument."""
  cause: Any = error
  while isinstance(cause, Exception):
    cause = cause.args[0]
  return cause


def _last_line(error: Exception) -> str:
  """The message of an error, also of one that has the traceback of a configuration file
  as text.
  """
  last = str(error).strip().splitlines()[-1].strip()
  return re.sub(r'^(\w*Error: |\[Errno \d+\] )', '', last)


def task_class(name: str) -> Any:
  """Imports the class of a task."""
  if name not in TASKS:
    raise ConfigError(
      f"unknown task '{name}' in the configuration; choose one of: {', '.join(TASKS)}"
    )
  module, attribute = TASKS[name].split(':')
  return getattr(importlib.import_module(module), attribute)


def tensorboard_writer(workdir: epath.Path) -> Any:
  """Makes a writer of event files. TensorFlow, which it needs, is kept off the
  accelerators.
  """
  try:
    from clu import metric_writers  # imports TensorFlow, which is slow
    import tensorflow as tf
  except ImportError as error:
    raise InputError(
      f'TensorBoard files need the train extra ({error}); '
      "pip install 'dicetalk-jax[train]', or add --notensorboard"
    ) from error
  tf.config.set_visible_devices([], 'GPU')
  return metric_writers.AsyncWriter(
    metric_writers.SummaryWriter(str(orbax_paths.plain(workdir)))
  )


def check_tensorboard() -> None:
  """Refuses a run that could not write its event files, before it computes anything.

  Only looks whether TensorFlow is there: importing it takes seconds.
  """
  if importlib.util.find_spec('tensorflow') is None:
    raise InputError(
      'TensorBoard files need the train extra (tensorflow is missing); '
      "pip install 'dicetalk-jax[train]', or add --notensorboard"
    )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise ConfigError(
      f'unexpected argument {argv[1]!r}; options look like --config=FILE --workdir=DIR'
    )
  if not _WORKDIR.value:
    raise ConfigError(
      '--workdir is missing; name a directory for checkpoints, metrics and images, '
      f'such as --workdir=runs/{_CONFIG.value.task}'
    )
  if _TENSORBOARD.value:
    check_tensorboard()
  config = _CONFIG.value
  profile = parse_span(_PROFILE.value)
  keep_programs()
  parallel.initialize(
    config.multihost, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
  )

  # Imported after `initialize`, since imports may touch devices.
  from dicetalk_jax.training.loop import train

  train(
    task_class(config.task),
    config,
    _WORKDIR.value,
    make_writer=tensorboard_writer if _TENSORBOARD.value else None,
    profile=profile,
  )


def run() -> None:
  """Runs the command; without arguments it prints its help.

  A user's mistake is one sentence and exit code 2.
  """
  # A configuration imports its neighbours from the current folder. `python -m` puts
  # that on the path, an installed script does not.
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())

  # absl describes the main module, which is another one if an installed script runs
  # this function.
  sys.modules['__main__'].__doc__ = __doc__
  for flag in flags.FLAGS.get_key_flags_for_module(__name__):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

  if len(sys.argv) == 1:
    app.usage(shorthelp=True, exitcode=2)
  jax.config.config_with_absl()
  with cli.console():
    app.run(main, flags_parser=parse_flags)


if __name__ == '__main__':
  run()

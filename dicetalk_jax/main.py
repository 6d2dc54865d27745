"""The training entry: a configuration file and a work directory make a run.

    python -m dicetalk_jax.main --config=configs/diffusion.py:tiny
    --workdir=runs/diffusion

Any value of the configuration can be overridden (`--config.optim.lr=3e-4`), and any
option of jax is a flag (`--jax_compilation_cache_dir=DIR` keeps compiled programs from
one run to the next).
"""

import importlib
import re
import sys

from absl import app, flags, logging
from etils import epath
import jax
from ml_collections import config_flags

from dicetalk_jax import parallel
from dicetalk_jax.errors import ConfigError, InputError, one_sentence
from dicetalk_jax.training.profile import parse_span

TASKS = {
  'autoencoder': 'dicetalk_jax.training.autoencoder:AutoencoderTask',
  'embedder': 'dicetalk_jax.training.embedder:EmbedderTask',
  'diffusion': 'dicetalk_jax.training.diffusion:DiffusionTask',
}

USAGE = """\
usage: python -m dicetalk_jax.main --config=FILE[:PRESET,...] --workdir=DIR [--config.KEY=VALUE ...]
  --config      configs/autoencoder.py, configs/embedder.py or configs/diffusion.py, with presets that combine:
                'tiny', and variants and ablations that the file lists (configs/diffusion.py:tiny,abl_no_bank)
  --workdir     checkpoints, metrics, pictures and the model go here; the same command again resumes the run
  --config.model=DIR              model folder with what is not trained; it is read only
  --config.multihost=True         one of several processes that train together; see docs/scale.md
  --coordinator=HOST:PORT --processes=N --process=I     by hand, where no cluster says which processes there are
  --[no]tensorboard               event files for TensorBoard in the work directory (default: yes)
  --profile=START:COUNT           a profile of COUNT steps from START on, in profile/ of the work directory
  --jax_compilation_cache_dir=DIR keeps compiled programs from one run to the next
"""

_CONFIG = config_flags.DEFINE_config_file(
  'config', help_string='Configuration file, with presets after a colon.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'Directory of the run; an existing run is resumed.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', 'HOST:PORT of process 0; or JAX_COORDINATOR_ADDRESS.'
)
_PROCESSES = flags.DEFINE_integer(
  'processes', 0, 'How many processes train together; or JAX_NUM_PROCESSES.'
)
_PROCESS = flags.DEFINE_integer(
  'process', -1, 'Which of them this is, from 0; or JAX_PROCESS_ID.'
)
_TENSORBOARD = flags.DEFINE_bool(
  'tensorboard', True, 'Write event files for TensorBoard.'
)
_PROFILE = flags.DEFINE_string(
  'profile', '', 'START:COUNT, the steps to write a profile of.'
)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line and loads the configuration; a mistake in either is a
  ConfigError.
  """
  try:
    rest = flags.FLAGS(argv)
    if flags.FLAGS['verbosity'].using_default_value:
      flags.FLAGS.verbosity = logging.WARNING  # libraries log much at INFO
    if _CONFIG.value is None:
      raise ConfigError(
        '--config is missing; for example --config=configs/diffusion.py:tiny'
      )
    _CONFIG.value.task  # noqa: B018, a file that cannot be read shows here
  except (OSError, SyntaxError, ImportError) as error:
    raise ConfigError(
      f'cannot read the configuration file: {_last_line(error)}; '
      'the repository has them in configs/'
    ) from error
  except (AttributeError, KeyError) as error:
    cause = error
    while isinstance(
      cause, Exception
    ):  # a KeyError wrapped in an AttributeError, or not
      cause = cause.args[0]
    raise ConfigError(
      'the configuration has no such key: ' + '. '.join(cause.split('\n'))
    ) from error
  except flags.Error as error:
    raise ConfigError(_last_line(error)) from error
  return rest


def _last_line(error: Exception) -> str:
  """The sentence of an error, also of one that brings the traceback of a
  configuration file as text.
  """
  return re.sub(
    r'^(\w*Error: |\[Errno \d+\] )', '', str(error).strip().splitlines()[-1].strip()
  )


def task_class(name: str):
  """The class of a task, imported now."""
  if name not in TASKS:
    raise ConfigError(
      f"unknown task '{name}' in the configuration; choose one of: {', '.join(TASKS)}"
    )
  module, attribute = TASKS[name].split(':')
  return getattr(importlib.import_module(module), attribute)


def tensorboard_writer(workdir: epath.Path):
  """A writer of event files; TensorFlow, which it needs, is kept off the
  accelerators.
  """
  try:
    from clu import metric_writers  # costs a TensorFlow import, so only here
    import tensorflow as tf
  except ImportError as error:
    raise InputError(
      f'TensorBoard files need the train extra ({error}); '
      "pip install 'dicetalk-jax[train]', or add --notensorboard"
    ) from error
  tf.config.set_visible_devices([], 'GPU')
  return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise ConfigError(
      f'unexpected argument {argv[1]!r}; options look like --config=FILE --workdir=DIR'
    )
  if not _WORKDIR.value:
    raise ConfigError(
      '--workdir is missing; name a directory for checkpoints, metrics and pictures'
    )
  config, profile = _CONFIG.value, parse_span(_PROFILE.value)
  parallel.initialize(
    config.multihost, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
  )
  from dicetalk_jax.training.loop import (
    train,
  )  # after `start`: imports may touch devices

  train(
    task_class(config.task),
    config,
    _WORKDIR.value,
    make_writer=tensorboard_writer if _TENSORBOARD.value else None,
    profile=profile,
  )


def run() -> None:
  """Console entry: no argument prints the usage; a user's mistake is one sentence
  and exit code 2.
  """
  if len(sys.argv) == 1:
    print(USAGE, end='', file=sys.stderr)
    sys.exit(2)
  jax.config.config_with_absl()
  with one_sentence():
    app.run(main, flags_parser=parse_flags)


if __name__ == '__main__':
  run()

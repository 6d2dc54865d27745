"""`python -m convert COMMAND`: converts and checks published weights."""

import argparse
from collections.abc import Sequence
import logging
import os
import sys
from types import ModuleType
from typing import Any

from dicetalk_jax import cli
from dicetalk_jax.errors import InputError, one_sentence

EXAMPLE = """examples:
  python -m convert dicetalk checkpoints/DICE-Talk models/dicetalk \\
      --svd checkpoints/stable-video-diffusion-img2vid-xt \\
      --whisper checkpoints/whisper-tiny --priors examples/emo
  python -m convert inspect models/dicetalk
  python -m convert export models/dicetalk exported
  python -m convert verify tests/goldens/audio_proj tests/goldens/vae"""


def load_commands() -> tuple[ModuleType, ...]:
  """Imports the module of every command; PyTorch makes this take seconds.

  Raises:
    InputError: PyTorch is missing.
  """
  try:
    from convert import dicetalk, export, inspect_files, priors, sonic, svd, whisper
    from convert.accept import command as accept
    from convert.verify import command as verify
  except ModuleNotFoundError as missing:
    if missing.name != 'torch':
      raise
    raise InputError(
      "PyTorch is missing; pip install 'dicetalk-jax[convert]' adds it"
    ) from missing
  return dicetalk, sonic, svd, whisper, priors, export, inspect_files, verify, accept


def make_parser() -> argparse.ArgumentParser:
  """Makes the parser of all commands.

  The module of a command has `add_parser(commands)`, which adds the parser of that
  command and sets its `run(args)`, a function that returns the exit code.
  """
  parser = cli.OptionParser(
    prog='python -m convert',
    description='Converts and checks published weights.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
  for module in load_commands():
    module.add_parser(commands)
  return parser


def run_command(argv: Sequence[str] | None = None) -> None:
  """Runs a command, and raises SystemExit at its end.

  A mistake of the user ends it with one sentence and exit code 2.
  """
  with one_sentence():
    try:
      args = make_parser().parse_args(argv)
      sys.exit(args.run(args))
    except OSError as error:
      raise InputError(
        f'{_refusal(error)}; check the path, its permissions and the free space'
      ) from error


def _refusal(error: OSError) -> str:
  """Describes what the system refused, with the file if the error names it."""
  reason = error.strerror or str(error)
  return f'{error.filename}: {reason}' if error.filename else reason


def main() -> None:
  """Runs a command in a process of its own, which ends at once if something fails.

  Threads of Orbax may still write then. Nothing else stops them, and they would print
  tracebacks because their folder is gone. If that folder comes back through them, it is
  a hidden one next to the destination; the next run to that destination removes it.
  """
  sys.unraisablehook = _report_unraisable
  logging.getLogger('absl').addFilter(_says_more)
  try:
    with cli.console():
      run_command()
  except SystemExit as stop:
    if not isinstance(stop.code, int) or stop.code == 0:
      raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(stop.code)


# If a disk fills up, every thread of Orbax logs that, and every write under way finds
# its event loop closed. Their tracebacks would break up the one sentence.
def _says_more(record: logging.LogRecord) -> bool:
  """Filters the log of threads that failed."""
  return '_SignalingThread.run() raised' not in record.getMessage()


def _report_unraisable(failure: Any) -> None:
  """Reports what threads raise, except the consequences of an error that is known."""
  if str(failure.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(failure)


if __name__ == '__main__':
  main()

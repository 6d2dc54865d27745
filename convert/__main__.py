"""`python -m convert COMMAND`: published weights in, out, and checked."""

import argparse
from collections.abc import Sequence
import signal
import sys

from dicetalk_jax import cli
from dicetalk_jax.errors import InputError, one_sentence

if __name__ == '__main__':
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # while PyTorch loads, nothing is begun
try:
  from convert import (
    background,
    dicetalk,
    export,
    inspect_files,
    priors,
    sonic,
    svd,
    verify,
    whisper,
  )
except ModuleNotFoundError as missing:
  if missing.name != 'torch':
    raise
  print(
    "error: PyTorch is missing; pip install 'dicetalk-jax[convert]' adds it",
    file=sys.stderr,
  )
  sys.exit(2)

COMMANDS = (dicetalk, sonic, svd, whisper, priors, export, inspect_files, verify)

EXAMPLE = """examples:
  python -m convert dicetalk checkpoints/DICE-Talk models/dicetalk --priors examples/emo \\
      --svd checkpoints/stable-video-diffusion-img2vid-xt --whisper checkpoints/whisper-tiny
  python -m convert inspect models/dicetalk
  python -m convert export models/dicetalk exported
  python -m convert verify tests/goldens/audio_proj tests/goldens/vae"""


def parser() -> argparse.ArgumentParser:
  """Every command is a module with `add_parser(commands)`, which sets `run(args) ->
  exit code`.
  """
  top = cli.OptionParser(
    prog='python -m convert',
    description='Converts and checks published weights.',
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = top.add_subparsers(title='commands', metavar='COMMAND', required=True)
  for module in COMMANDS:
    module.add_parser(commands)
  return top


def run(argv: Sequence[str] | None = None) -> None:
  """Runs a command and raises SystemExit; mistakes of the user end with one sentence
  and code 2.
  """
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(
      number, signal.default_int_handler
    )  # either way, what was begun is removed
  try:
    with one_sentence():
      args = parser().parse_args(argv)
      try:
        sys.exit(args.run(args))
      except OSError as error:
        what = ': '.join(str(x) for x in (error.filename, error.strerror or error) if x)
        raise InputError(
          f'{what}; check the path, its permissions and the room left'
        ) from error
      except KeyboardInterrupt:
        print('interrupted; nothing half-made is left', file=sys.stderr)
        sys.exit(130)
  finally:
    background.make_way()


def main() -> None:
  """`run` as a process of its own."""
  with background.quiet():
    try:
      run()
    except SystemExit as stop:
      background.leave(stop.code)


if __name__ == '__main__':
  main()

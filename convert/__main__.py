"""`python -m convert COMMAND`: published weights in, out, and checked."""

import argparse
from collections.abc import Sequence
import sys

from convert import verify
from dicetalk_jax.errors import one_sentence

COMMANDS = (verify,)

EXAMPLE = """example:
  python -m convert verify tests/goldens/audio_proj tests/goldens/vae"""


def parser() -> argparse.ArgumentParser:
  """Every command is a module with `add_parser(commands)`, which sets `run(args) -> exit code`."""
  top = argparse.ArgumentParser(
      prog='python -m convert', description='Converts and checks published weights.', epilog=EXAMPLE,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = top.add_subparsers(title='commands', metavar='COMMAND', required=True)
  for command in COMMANDS:
    command.add_parser(commands)
  return top


def run(argv: Sequence[str] | None = None) -> None:
  """Runs a command and leaves with its exit code; mistakes of the user end with one sentence and code 2."""
  args = parser().parse_args(argv)
  with one_sentence():
    sys.exit(args.run(args))


if __name__ == '__main__':
  run()

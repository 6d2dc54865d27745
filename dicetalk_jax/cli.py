"""What the small commands share: flags that are explained in one sentence when
wrong, and the console entry.
"""

import argparse
from collections.abc import Callable
import sys

from dicetalk_jax.errors import ConfigError, InputError, one_sentence


class OptionParser(argparse.ArgumentParser):
  """argparse with its own help; `prog` is `python -m MODULE`.

  Raises ConfigError for what is wrong, in one sentence.
  """

  def error(self, message):
    raise ConfigError(f'{message}; see {self.prog} --help')


class Parser(argparse.ArgumentParser):
  """Parses `--name=value` flags; its help is `text`.

  Raises InputError for what is wrong, in one sentence.
  """

  def __init__(self, module: str, text: str):
    super().__init__(allow_abbrev=False)
    self.module, self.text = module, text

  def error(self, message):
    raise InputError(
      f'{message}; run python -m {self.module} without arguments to see how it is used'
    )

  def print_help(self, file=None):
    print(self.text, end='', file=file)


def run(main: Callable[[list[str]], None], usage: str) -> None:
  """Console entry: no argument prints the usage; a user's mistake is one sentence
  and exit code 2.
  """
  if len(sys.argv) == 1:
    print(usage, end='', file=sys.stderr)
    sys.exit(2)
  with one_sentence():
    main(sys.argv[1:])

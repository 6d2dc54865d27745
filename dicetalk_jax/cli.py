"""Shared parts of the commands: flags with help, and the console entry."""

import argparse
from collections.abc import Callable, Iterator
import contextlib
import io
import sys
from typing import NoReturn

from dicetalk_jax import interrupt
from dicetalk_jax.errors import ConfigError, one_sentence


class OptionParser(argparse.ArgumentParser):
  """argparse whose help names defaults; `prog` is `python -m MODULE`.

  Raises ConfigError for what is wrong, in one sentence.
  """

  def __init__(self, *args, **kwargs):
    kwargs.setdefault('formatter_class', HelpFormatter)
    kwargs.setdefault('allow_abbrev', False)
    super().__init__(*args, **kwargs)

  def error(self, message: str) -> NoReturn:
    raise ConfigError(f'{message}; see {self.prog} --help')


class HelpFormatter(argparse.HelpFormatter):
  """Adds its default to the help of a flag that has one."""

  def _get_help_string(self, action: argparse.Action) -> str:
    text = action.help or ''
    none = (None, False, '', argparse.SUPPRESS)
    has_default = not any(action.default is value for value in none)
    if has_default and '%(default)' not in text:
      text += ' (default: %(default)s)'
    return text


@contextlib.contextmanager
def console() -> Iterator[None]:
  """What all commands share, around everything that they do.

  A mistake of the user is one sentence and exit code 2, Ctrl-C is one line and exit
  code 130. Names of files that are not UTF-8 are printed byte for byte.
  """
  with _any_name_printed(), interrupt.ends_with_one_line(), one_sentence():
    yield


@contextlib.contextmanager
def _any_name_printed() -> Iterator[None]:
  stdout = sys.stdout
  if not isinstance(stdout, io.TextIOWrapper):
    yield
    return
  errors = stdout.errors
  stdout.reconfigure(errors='surrogateescape')
  try:
    yield
  finally:
    stdout.reconfigure(errors=errors)


def run(main: Callable[[list[str]], None], parser: argparse.ArgumentParser) -> None:
  """Console entry: a mistake of the user is one sentence, and exit code 2.

  Without any argument, the help of `parser` is shown.
  """
  if len(sys.argv) == 1:
    parser.print_help(sys.stderr)
    sys.exit(2)
  with console():
    main(sys.argv[1:])

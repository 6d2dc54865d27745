"""Errors that a user can cause.

Each of them ends a command with one sentence and exit code 2.
"""

from collections.abc import Iterator
import contextlib
import sys
import warnings


class UserError(Exception):
  """Base of the family. The message says what is wrong, then what to do."""


class InputError(UserError):
  """A file, image, recording or flag cannot be used."""


class ConfigError(UserError):
  """A configuration asks for something unknown or impossible."""


class DataError(UserError):
  """A data set, clip or stored feature is missing, too short or does not fit."""


class WeightsError(UserError):
  """A weight file or model folder does not fit the model."""


class MeshError(UserError):
  """Devices, batch and parameters do not divide as asked."""


class Note(UserWarning):
  """Something that a user should know, though nothing is wrong."""


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
  """Turns a UserError into one line on stderr and exit code 2, for console entries.

  A Note is one line on stderr as well.
  """
  try:
    with warnings.catch_warnings():
      shorten_notes()
      yield
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def shorten_notes() -> None:
  """Shows notes without the place in the code that warnings have, in this process."""
  show_other = warnings.showwarning

  def show(message, category, *place, **options) -> None:
    if issubclass(category, Note):
      print(f'note: {message}', file=sys.stderr)
    else:
      show_other(message, category, *place, **options)

  warnings.showwarning = show

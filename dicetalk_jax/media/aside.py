"""Outputs are written aside and moved when whole: nobody ever finds half a file."""

from collections.abc import Iterator
import contextlib
import os
import pathlib

from dicetalk_jax.errors import InputError


@contextlib.contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a temporary file beside `path`; moves it there at the end, or removes it on
  failure.

  Missing parent folders are made.

  Raises:
    InputError: the place cannot be written to.
  """
  path = pathlib.Path(path)
  part = path.with_name(f'.{path.name}.{os.getpid()}.part')
  if path.is_dir():
    raise InputError(f'cannot write {path}: it is a folder; name a file')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
  except OSError as error:
    raise InputError(
      f'cannot write {path}: {error.strerror}; choose another place'
    ) from error
  try:
    yield part
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)

"""Folders are written aside and moved when whole: nobody ever finds half a model."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil

from dicetalk_jax.errors import InputError


def refuse_existing(path: pathlib.Path, overwrite: bool, mark: str) -> None:
  """Checks that a folder may be written.

  Args:
    path: of the folder to be.
    overwrite: whether it may replace one of the same kind.
    mark: the file that tells the kind: other folders are never replaced.

  Raises:
    InputError: there is something already.
  """
  if not path.exists() and not path.is_symlink():
    return
  if not overwrite:
    raise InputError(f'{path} exists; choose another place, or add --overwrite to replace it')
  if not (path / mark).is_file():
    raise InputError(f'{path} exists and is not what would replace it (it has no {mark}); choose another place')


@contextlib.contextmanager
def folder_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a temporary folder beside `path`; moves it there at the end, or removes it on failure and interruption.

  Raises:
    InputError: the place cannot be written to, or is full.
  """
  path = path.resolve()
  part = path.with_name(f'.{path.name}.{os.getpid()}.part')
  old = path.with_name(f'.{path.name}.{os.getpid()}.old')
  try:
    part.mkdir(parents=True)
    yield part
    if path.exists():
      path.rename(old)
    part.rename(path)
  except OSError as error:
    raise InputError(f'cannot write {path}: {error.strerror or error}; choose another place or make room') from error
  finally:
    if old.exists() and not path.exists():
      old.rename(path)
    for rest in (part, old):
      shutil.rmtree(rest, ignore_errors=True)


def require_room(path: pathlib.Path, size: int) -> None:
  """Finds out before, not after minutes, that `size` bytes do not fit.

  Raises:
    InputError: they do not.
  """
  place = next(parent for parent in path.absolute().parents if parent.exists())
  if (free := shutil.disk_usage(place).free) < 1.05 * size:     # indexes and names besides
    raise InputError(f'{path} needs {size / 1e9:.1f} GB, but {place} has {free / 1e9:.1f} GB left; make room')

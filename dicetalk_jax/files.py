"""Atomic files and folders: written under another name, and moved when whole.

So nobody ever finds half a video or half a model.

The other name of a folder is `.NAME.XXXXXXXX.part`, next to the folder NAME and locked
by the process that writes it: `new` in it becomes the folder, `old` is what that
replaces. The system drops the lock of a killed process; the next run to NAME clears up.
"""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import sys
import tempfile

from dicetalk_jax.errors import InputError, UserError

# How TensorStore, safetensors and Python spell the error number of the system.
_REFUSAL = re.compile(r"(?:os_error_code='|os error |Errno )(\d+)")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a temporary file next to `path`, and moves it there at the end.

  Missing parent folders are made. After a failure the temporary file is removed.

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


def refuse_existing(path: pathlib.Path, overwrite: bool, mark: str) -> None:
  """Clears up after killed runs and checks that a folder may be written.

  Args:
    path: of the folder to be.
    overwrite: whether it may replace one of the same kind.
    mark: a file that all folders of the kind have; others are never replaced.

  Raises:
    InputError: there is something that may not be replaced.
  """
  _clear_up(path.resolve())
  if not path.exists() and not path.is_symlink():
    return
  if not overwrite:
    raise InputError(
      f'{path} exists; choose another place, or add --overwrite to replace it'
    )
  if not (path / mark).is_file():
    raise InputError(
      f'{path} exists and is not what would replace it (it has no {mark}); choose '
      'another place'
    )


def _remove(folder: pathlib.Path) -> None:
  shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a temporary folder next to `path`, and moves it there at the end.

  Args:
    path: of the folder to be; it may replace one (see `refuse_existing`).

  Raises:
    InputError: the place cannot be written to, or is full.
  """
  path = path.resolve()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = pathlib.Path(tempfile.mkdtemp('.part', f'.{path.name}.', path.parent))
    try:
      with _lock(part):
        (new := part / 'new').mkdir()
        yield new
        if path.exists():
          path.rename(part / 'old')
        new.rename(path)
    except BaseException:
      _restore(part, path)
      _remove(part)
      raise
    _remove(part)
  except UserError:
    raise
  except Exception as error:
    if cause := _refusal(error):
      raise InputError(
        f'cannot write {path}: {cause}; choose another place or make room'
      ) from error
    raise


def _refusal(error: Exception) -> str | None:
  """Returns what the operating system said, if that is the reason.

  Libraries wrap it in errors of their own.
  """
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  number = _REFUSAL.search(f'{error} {error.__context__}')
  return os.strerror(int(number[1])) if number else None


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike, waiting: str) -> Iterator[bool]:
  """Holds a folder while the context lasts, and waits for another process that does.

  The system frees the folder of a process that ends, however it ends.

  Args:
    folder: made if it does not exist.
    waiting: printed if another process holds it.

  Gives whether it is held: not every file system has locks.
  """
  while True:
    os.makedirs(folder, exist_ok=True)
    with _lock(folder, waiting) as handle:
      # Whoever held it may have removed it: then this lock is on no folder.
      if handle is None or _is_open_at(handle, folder):
        yield handle is not None
        return


@contextlib.contextmanager
def _lock(folder: str | os.PathLike, waiting: str = '') -> Iterator[int | None]:
  """Marks a folder as in use while this process lives.

  Args:
    folder: the folder.
    waiting: printed before waiting for another process; '' does not wait.

  Gives the open folder; None if it is not locked, as not every file system has locks.
  """
  handle = os.open(folder, os.O_RDONLY)
  try:
    yield handle if _flock(handle, waiting) else None
  finally:
    os.close(handle)


def _is_open_at(handle: int, folder: str | os.PathLike) -> bool:
  try:
    return os.path.samestat(os.fstat(handle), os.stat(folder))
  except FileNotFoundError:
    return False


def _flock(handle: int, waiting: str) -> bool:
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    if not waiting:
      return False
    print(waiting, file=sys.stderr, flush=True)
    fcntl.flock(handle, fcntl.LOCK_EX)
  except OSError:
    return False
  return True


def _clear_up(path: pathlib.Path) -> None:
  """Removes what killed runs to `path` left.

  A folder that one of them was replacing just then comes back.
  """
  name = re.compile(rf'\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.part')
  left = [part for part in path.parent.glob('.*.part') if name.fullmatch(part.name)]
  for part in left:
    with contextlib.suppress(OSError), _lock(part) as handle:
      if handle is not None:
        _restore(part, path)
        shutil.rmtree(part)


def _restore(part: pathlib.Path, path: pathlib.Path) -> None:
  """Puts the replaced folder back if nothing took its place."""
  old = part / 'old'
  if old.exists() and not path.exists():
    old.rename(path)


def walk(
  root: str | os.PathLike, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
  """Walks a folder as `os.walk` does, and follows links to folders.

  A link to a folder that it lies in is left out: it would never end.

  Args:
    root: a local folder.
    onerror: takes what a folder that cannot be listed raised.
  """
  root = os.fspath(root)
  above = {root: frozenset({_place(root)})}  # a folder and all that it lies in
  for folder, folders, names in os.walk(root, onerror=onerror, followlinks=True):
    places = above.pop(folder)
    for name in [*folders]:
      path = os.path.join(folder, name)
      place = _place(path)
      if place in places:
        folders.remove(name)
      else:
        above[path] = places | {place}
    yield folder, folders, names


def _place(folder: str) -> tuple[int, int] | None:
  """What is the same for all names of a folder; None if it cannot be reached."""
  try:
    facts = os.stat(folder)
  except OSError:
    return None
  return facts.st_dev, facts.st_ino


def printable(path: str | os.PathLike) -> str:
  r"""A path for people: bytes that are not UTF-8 are escaped, as in `rom\xe9.mp4`."""
  return os.fsencode(path).decode('utf-8', 'backslashreplace')


def require_room(path: pathlib.Path, size: int) -> None:
  """Finds out before, not after minutes, that `size` bytes do not fit.

  Raises:
    InputError: they do not.
  """
  place = next(parent for parent in path.absolute().parents if parent.exists())
  free = shutil.disk_usage(place).free
  if free < 1.05 * size:  # there are indexes and names, too
    raise InputError(
      f'{path} needs {size / 1e9:.1f} GB, but {place} has {free / 1e9:.1f} GB left; '
      'make room'
    )

"""Folders of files, on disk or wherever fsspec reaches (`gs://`, `s3://`, ...)."""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import os
import posixpath
import tempfile

from fsspec.implementations.local import LocalFileSystem

from data_pipelines import filesystems
from data_pipelines.corpora.clip_file import Skipped
from dicetalk_jax import text_files
from dicetalk_jax.errors import InputError
from dicetalk_jax.files import printable, walk


class Tree:
  """The files below a root, by their path relative to it."""

  def __init__(self, root: str | os.PathLike, flag: str = '--root'):
    """Opens a folder.

    Args:
      root: a folder, or an address with a protocol that fsspec knows.
      flag: the flag that named it, for messages.

    Raises:
      InputError: there is no such folder.
    """
    try:
      self.fs, self.root = filesystems.open_folder(root)
      found = self.fs.isdir(self.root)
    except (ImportError, ValueError) as error:
      raise InputError(
        f'{flag}={root} cannot be opened ({error}); give a folder'
      ) from error
    if not found:
      raise InputError(f'{flag}={root} is not a folder; check the path')
    self.address = os.fspath(root)

  def __reduce__(self):
    return Tree, (filesystems.address_of(self.fs, self.root),)

  def __contains__(self, path: str) -> bool:
    return path in self._sizes

  @functools.cached_property
  def files(self) -> tuple[str, ...]:
    """All files in sorted order, without hidden ones."""
    return tuple(sorted(self._sizes))

  @property
  def left_out(self) -> tuple[Skipped, ...]:
    """What no walker sees: names that are not UTF-8, folders that cannot be listed."""
    return self._listing[1]

  @property
  def _sizes(self) -> dict[str, int | None]:
    """Bytes of all files by path; None where the listing does not say."""
    return self._listing[0]

  @functools.cached_property
  def _listing(self) -> tuple[dict[str, int | None], tuple[Skipped, ...]]:
    if isinstance(self.fs, LocalFileSystem):
      return _list_disk(self.root)
    sizes: dict[str, int | None] = {}
    for folder, folders, files in self.fs.walk(self.root, detail=True):
      for name in list(folders):
        if name.startswith('.'):
          folders.pop(name)  # `walk` does not enter it then
      inside = posixpath.relpath(folder, self.root)
      for name, facts in files.items():
        if name and not name.startswith('.'):
          path = posixpath.normpath(posixpath.join(inside, name))
          sizes[path] = facts.get('size')
    return sizes, ()

  @functools.cached_property
  def by_stem(self) -> dict[str, list[str]]:
    """Paths by path without extension."""
    table: dict[str, list[str]] = {}
    for path in self.files:
      table.setdefault(posixpath.splitext(path)[0], []).append(path)
    return table

  def find(self, stem: str, extensions: tuple[str, ...]) -> str:
    """Finds the file of a path without extension.

    Args:
      stem: the path.
      extensions: in order of preference.

    Returns:
      The path with its extension, or '' if there is none.
    """
    found = {extension(path): path for path in self.by_stem.get(stem, ())}
    for wanted in extensions:
      if wanted in found:
        return found[wanted]
    return ''

  def size(self, path: str) -> int:
    """Gives the bytes of a file. If the tree was listed, nothing is asked again.

    Raises:
      FileNotFoundError: there is no such file.
    """
    is_listed = '_listing' in vars(self)
    if is_listed:
      size = self._sizes.get(path)
      if size is not None:
        return size
    return int(self.fs.size(posixpath.join(self.root, path)))

  def read_text(self, path: str) -> str:
    """Reads a text file in any usual encoding; lines end with a line feed."""
    return text_files.decode(self.read_bytes(path))

  def read_bytes(self, path: str) -> bytes:
    """Reads a file."""
    return self.fs.cat_file(posixpath.join(self.root, path))

  @contextlib.contextmanager
  def local(self, path: str) -> Iterator[str]:
    """Gives a path that decoders can open.

    A remote file is copied, and the copy is removed afterwards.

    Raises:
      FileNotFoundError: there is no such file.
    """
    full = posixpath.join(self.root, path)
    if isinstance(self.fs, LocalFileSystem):
      if not os.path.isfile(full):
        raise FileNotFoundError(full)
      yield full
      return
    with tempfile.TemporaryDirectory() as folder:
      copy = os.path.join(folder, posixpath.basename(path))
      self.fs.get_file(full, copy)
      yield copy


def _list_disk(root: str) -> tuple[dict[str, int | None], tuple[Skipped, ...]]:
  """Lists the files of a folder on a disk, also behind links."""
  sizes: dict[str, int | None] = {}
  left_out: list[Skipped] = []

  def relative(path: str) -> str:
    return printable(os.path.relpath(path, root))

  def note_folder(error: OSError) -> None:
    reason = 'folder cannot be read'
    left_out.append(Skipped(relative(error.filename), reason, error.strerror or ''))

  def is_readable(folder: str, name: str) -> bool:
    """Whether a name is that of a visible file or folder, and in UTF-8."""
    if name.startswith('.'):
      return False
    try:
      name.encode()
    except UnicodeEncodeError:
      path = relative(os.path.join(folder, name))
      left_out.append(Skipped(path, 'name is not UTF-8'))
      return False
    return True

  for folder, folders, names in walk(root, onerror=note_folder):
    folders[:] = [name for name in folders if is_readable(folder, name)]
    for name in names:
      if is_readable(folder, name):
        path = os.path.join(folder, name)
        sizes[os.path.relpath(path, root)] = _size(path)
  return sizes, tuple(sorted(left_out, key=dataclasses.astuple))


def _size(path: str) -> int | None:
  try:
    return os.stat(path).st_size
  except OSError:
    return None  # a link to nowhere; whoever opens it says so


def extension(path: str) -> str:
  """Gives the extension in lower case, with the dot."""
  return posixpath.splitext(path)[1].lower()

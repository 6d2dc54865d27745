"""Folders of files, on disk or wherever fsspec reaches (`gs://`, `s3://`, ...)."""

from collections.abc import Iterator
import contextlib
import functools
import os
import posixpath
import tempfile

from fsspec.implementations.local import LocalFileSystem

from data_pipelines import filesystems
from dicetalk_jax import text_files
from dicetalk_jax.errors import InputError


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

  @functools.cached_property
  def _sizes(self) -> dict[str, int | None]:
    """Bytes of all files by path; listings may include them."""
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
    return sizes

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
    is_listed = '_sizes' in vars(self)
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


def extension(path: str) -> str:
  """Gives the extension in lower case, with the dot."""
  return posixpath.splitext(path)[1].lower()

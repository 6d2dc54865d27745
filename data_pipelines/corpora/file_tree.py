"""Folders of files, on disk or wherever fsspec reaches (`gs://`, `s3://`, ...)."""

from collections.abc import Iterator
import contextlib
import functools
import os
import posixpath
import tempfile

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dicetalk_jax.errors import InputError


class Tree:
  """The files below a root, by their path relative to it.

  Args:
    root: a folder, or an address with a protocol that fsspec knows.
    flag: how the user named it, for messages.

  Raises:
    InputError: there is no such folder.
  """

  def __init__(self, root: str | os.PathLike, flag: str = '--root'):
    try:
      self.fs, self.root = fsspec.core.url_to_fs(os.fspath(root))
      found = self.fs.isdir(self.root)
    except (ImportError, ValueError) as error:
      raise InputError(
        f'{flag}={root} cannot be opened ({error}); give a folder'
      ) from error
    if not found:
      raise InputError(f'{flag}={root} is no folder; check the path')
    self.address = os.fspath(root)

  def __reduce__(self):
    return Tree, (
      self.fs.unstrip_protocol(self.root),
    )  # whole, for workers in another folder

  def __contains__(self, path: str) -> bool:
    return path in self._sizes

  @functools.cached_property
  def files(self) -> tuple[str, ...]:
    """All files in sorted order, hidden ones left out."""
    return tuple(sorted(self._sizes))

  @functools.cached_property
  def _sizes(self) -> dict[str, int | None]:
    """Bytes of all files by path, which listings tell by the way."""
    found = {}
    for folder, folders, files in self.fs.walk(self.root, detail=True):
      for name in [name for name in folders if name.startswith('.')]:
        folders.pop(name)
      inside = posixpath.relpath(folder, self.root)
      found |= {
        posixpath.normpath(posixpath.join(inside, name)): facts.get('size')
        for name, facts in files.items()
        if name and name[0] != '.'
      }
    return found

  @functools.cached_property
  def by_stem(self) -> dict[str, list[str]]:
    """Paths by path without extension."""
    table: dict[str, list[str]] = {}
    for path in self.files:
      table.setdefault(posixpath.splitext(path)[0], []).append(path)
    return table

  def find(self, stem: str, extensions: tuple[str, ...]) -> str:
    """The file of that path without extension, with the earliest of `extensions`; ''
    where there is none.
    """
    found = {extension(path): path for path in self.by_stem.get(stem, ())}
    return next((found[e] for e in extensions if e in found), '')

  def size(self, path: str) -> int:
    """Bytes of a file, without another question where the tree has been listed.

    Raises:
      FileNotFoundError
    """
    if '_sizes' in vars(self) and (size := self._sizes.get(path)) is not None:
      return size
    return int(self.fs.size(posixpath.join(self.root, path)))

  def read_text(self, path: str) -> str:
    """A text file; a byte-order mark is dropped."""
    return self.fs.cat_file(posixpath.join(self.root, path)).decode(
      'utf-8-sig', errors='replace'
    )

  @contextlib.contextmanager
  def local(self, path: str) -> Iterator[str]:
    """A path that decoders can open; a remote file is copied and the copy removed
    afterwards.

    Raises:
      FileNotFoundError
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
  """In lower case, with the dot."""
  return posixpath.splitext(path)[1].lower()

"""Folders on a disk or at an address, as fsspec wants them."""

import os

import fsspec
from fsspec.implementations.local import LocalFileSystem


def open_folder(
  folder: str | os.PathLike,
) -> tuple[fsspec.AbstractFileSystem, str]:
  """Gives the file system of a folder, and its path there.

  Only `://` makes an address: fsspec itself would read `file:x`, `data:x` and `a::b`
  as addresses too, which are legal names of local folders.

  Raises:
    ImportError, ValueError: the protocol of the address is not known.
  """
  folder = os.fspath(folder)
  if '://' in folder:
    return fsspec.core.url_to_fs(folder)
  return LocalFileSystem(), os.path.abspath(os.path.expanduser(folder))


def address_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
  """Gives what `open_folder` opens again, in any process and working directory."""
  return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)

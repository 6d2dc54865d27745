"""Folders whose own names hold `[`, `]`, `*` or `?` are searched like any other.

`epath.Path(folder).glob(pattern)` joins the two and takes all of it for a pattern, so
that below `runs/try [1]` it finds nothing. Orbax and TFDS search their folders with it
and continue without what they miss: a checkpoint never gets its index, and cannot be
read. Both make their paths themselves, so they cannot be given another kind of path.
Therefore the method is replaced in this process, for local paths alone; in etils 1.15
nothing else helps.
"""

from collections.abc import Iterator
import glob
import os

from etils.epath import gpath

_etils_glob = gpath.PosixGPath.glob


def install() -> None:
  """Makes `epath.Path.glob` take its folder literally.

  Addresses (`gs://`) are searched as before.
  """
  gpath.PosixGPath.glob = _glob


def _glob(self: gpath.PosixGPath, pattern: str) -> Iterator[gpath.PosixGPath]:
  folder = os.fspath(self)
  if '://' in folder or '**' in pattern:  # etils refuses the latter itself
    return _etils_glob(self, pattern)
  return (self / found for found in glob.iglob(pattern, root_dir=folder))

"""Unpickling that runs no code: arrays, plain containers, and nothing else.

A pickle may name any function of any module and have it called. Here it may name
NumPy's array constructors, and how old protocols spell bytes; all else is refused
before anything is called.
"""

import pickle
from typing import Any, BinaryIO

ALLOWED = {
  ('numpy', 'dtype'),
  ('numpy', 'ndarray'),
  ('numpy._core.multiarray', '_reconstruct'),
  ('numpy.core.multiarray', '_reconstruct'),  # as NumPy 1 names it
  ('_codecs', 'encode'),
}


class ForbiddenError(Exception):
  """A pickle asks for something that is not on the list; the message is its name."""


class _Unpickler(pickle.Unpickler):
  """Knows what is on the list."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in ALLOWED:
      raise ForbiddenError(f'{module}.{name}')
    return super().find_class(module.replace('numpy.core.', 'numpy._core.'), name)


def load(file: BinaryIO) -> Any:
  """Reads the next pickle of a file.

  The caller limits the size of the file. Arrays may claim to be larger than it, so
  check their `nbytes` before computing with them.

  Raises:
    ForbiddenError: the pickle asks for something else than arrays; nothing was called.
    Exception: of almost any kind, if the file is damaged.
  """
  return _Unpickler(file).load()

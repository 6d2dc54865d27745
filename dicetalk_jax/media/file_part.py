"""A piece of a file that decoders read as a file of its own."""

import io
from typing import BinaryIO


class FilePart(io.RawIOBase):
  """`head`, then the bytes from `start` to `end` of a file.

  Decoders are given this instead of a path: they can neither take a name for an address
  nor open another file.

  Attributes:
    error: what went wrong while reading. Decoders see the end of the file there.
  """

  def __init__(self, file: BinaryIO, start: int, end: int, head: bytes = b''):
    super().__init__()
    self.error: OSError | None = None
    self._file = file
    self._start = start
    self._head = head
    self._size = len(head) + end - start
    self._position = 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._position

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    origin = (0, self._position, self._size)[whence]
    self._position = max(0, origin + offset)
    return self._position

  def readinto(self, buffer) -> int:
    view = memoryview(buffer).cast('B')
    in_file = self._position - len(self._head)
    try:
      if in_file < 0:
        piece = self._head[self._position:self._position + len(view)]
        view[:len(piece)] = piece
        count = len(piece)
      else:
        self._file.seek(self._start + in_file)
        rest = max(0, self._size - self._position)
        count = self._file.readinto(view[:rest])
    except OSError as error:
      self.error = error
      return 0
    self._position += count
    return count

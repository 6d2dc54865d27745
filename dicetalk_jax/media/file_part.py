"""Files and pieces of files for decoders, which never see their names."""

from collections.abc import Iterator
import contextlib
import io
from typing import BinaryIO, Self

import av

# Containers and streams of audio and video, by FFmpeg's names. Playlists (hls, dash,
# concat, sdp, vobsub) and drawings are not among them.
_FORMATS = (
  'mov,mp4,matroska,webm,avi,asf,flv,ogg,mpeg,mpegts,mpegvideo,mxf,rm,dv,nut,gif,ivf,'
  'h264,hevc,m4v,mp3,aac,loas,ac3,eac3,dts,truehd,wav,w64,aiff,au,caf,flac,amr,ape,'
  'wv,tta,voc,ircam,sox,dsf,tak,mpc,mpc8,shn,gsm,qcp,spdif,amrnb,amrwb,av1,obu,vvc'
)
_OPTIONS = {
  # Or a playlist would open what it names.
  'protocol_whitelist': 'none',
  'format_whitelist': _FORMATS,
}


class FilePart(io.RawIOBase):
  """`head`, then the bytes from `start` to `end` of a file.

  Decoders are given this instead of a path, so that they can neither take a name for an
  address nor open another file.

  Attributes:
    error: the first failure to read. Decoders see the end of the file there.
  """

  def __init__(self, file: BinaryIO, start: int, end: int, head: bytes = b''):
    super().__init__()
    self.error: OSError | None = None
    self._file = file
    self._start = start
    self._head = head
    self._size = len(head) + end - start
    self._position = 0

  @classmethod
  def whole(cls, file: BinaryIO) -> Self:
    """The whole file."""
    return cls(file, 0, file.seek(0, io.SEEK_END))

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
        piece = self._head[self._position : self._position + len(view)]
        view[: len(piece)] = piece
        count = len(piece)
      else:
        self._file.seek(self._start + in_file)
        rest = max(0, self._size - self._position)
        # All binary files have readinto, though BinaryIO lacks it.
        count = self._file.readinto(view[:rest])  # type: ignore[attr-defined]
    except OSError as error:
      self.error = error
      return 0
    self._position += count
    return count


@contextlib.contextmanager
def open_container(part: FilePart) -> Iterator[av.container.InputContainer]:
  """Opens a media file with FFmpeg, which cannot open addresses or other files for it.

  Of the formats that FFmpeg knows, only those that hold audio or video themselves are
  opened.

  Raises:
    av.FFmpegError: it is damaged or not a media file.
    OSError: it could not be read to its end.
  """
  try:
    with av.open(part, 'r', options=_OPTIONS, metadata_errors='ignore') as container:
      yield container
  except av.FFmpegError as error:
    raise part.error or error from None
  if part.error:
    raise part.error

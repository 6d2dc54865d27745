"""Recordings that were joined byte by byte into one file, separated again.

Decoders of most formats read the first recording and silently ignore the others.
"""

from collections.abc import Iterator
import re
import struct
from typing import BinaryIO

import av
import soundfile

from dicetalk_jax.media import mp3
from dicetalk_jax.media.file_part import FilePart, open_container

# How a file begins: long enough not to occur by chance in the data of another file.
_BEGINNINGS = [
  re.compile(pattern, re.DOTALL)
  for pattern in (
    rb'RIFF....WAVE',
    rb'RF64....WAVE',
    rb'FORM....AIF[CF]',
    rb'fLaC[\0\x80]\0\0\x22',
    rb'OggS\0[\x02\x06].{12}\0\0\0\0',  # page 0 of a stream
    rb'\x1a\x45\xdf\xa3.{1,40}?\x42\x82.(?:matroska|webm)',
  )
]
_LONGEST = 64  # bytes; no beginning is longer
_CHUNK = 1 << 20
_UNKNOWN_LENGTH = b'\xff' * 4


def parts(file: BinaryIO) -> list[FilePart]:
  """Cuts a file wherever another one of the same format begins.

  The contents decide, never the name: WAV, AIFF, FLAC, Ogg, Matroska, MP4 and MP3 are
  known. A file of any other format is one part. A beginning that is part of the
  preceding file, or that no decoder can open, is not cut off.
  """
  if mp3.is_mp3(file):
    return mp3.parts(file)
  size = file.seek(0, 2)
  is_mp4 = _read_at(file, 4, 4) == b'ftyp'
  _, *candidates = _mp4_starts(file) if is_mp4 else _starts(file)
  starts = [0]
  stated_end = _stated_end(file, mp3.after_tags(file, 0), size)
  for start, following in zip(candidates, [*candidates[1:], size]):
    if start < stated_end:
      continue  # part of the preceding file
    end = _stated_end(file, start, size)
    if _opens(_part(file, start, max(end, following))):
      starts.append(start)
      stated_end = end
  return [_part(file, start, end) for start, end in zip(starts, [*starts[1:], size])]


def _read_at(file: BinaryIO, position: int, size: int) -> bytes:
  file.seek(position)
  return file.read(size)


def _starts(file: BinaryIO) -> Iterator[int]:
  """Positions where files of a format in `_BEGINNINGS` begin."""
  yield 0
  tags = mp3.after_tags(file, 0)
  first = _read_at(file, tags, _LONGEST)
  pattern = next((pattern for pattern in _BEGINNINGS if pattern.match(first)), None)
  if pattern is None:
    return
  last = tags
  # Nothing can begin within the length that the header states.
  position = max(tags + 1, _stated_end(file, tags, file.seek(0, 2)))
  while chunk := _read_at(file, position, _CHUNK + _LONGEST):
    for match in pattern.finditer(chunk):
      if match.start() >= _CHUNK:
        break  # the next chunk holds it as well
      start = position + match.start()
      # Several streams of one Ogg file begin one after another.
      if not first.startswith(b'OggS') or start > _ogg_page_end(file, last):
        yield start
      last = start
    position += _CHUNK


def _ogg_page_end(file: BinaryIO, start: int) -> int:
  header = _read_at(file, start, 27)
  segments = header[26]
  return start + 27 + segments + sum(_read_at(file, start + 27, segments))


def _mp4_starts(file: BinaryIO) -> Iterator[int]:
  """Positions where MP4 files begin: at each `ftyp` box."""
  position = 0
  while len(box := _read_at(file, position, 16)) >= 8:
    length, name = struct.unpack('>I4s', box[:8])
    if name == b'ftyp':
      yield position
    if length == 1 and len(box) == 16:
      length = int.from_bytes(box[8:])
    if length < 8:  # to the end, or damaged
      return
    position += length


def _stated_end(file: BinaryIO, start: int, size: int) -> int:
  """The end of a WAV or AIFF file by its own header; `start` if that is unknown.

  The 8 bytes before the length are left out: some writers count them in it.
  """
  header = _read_at(file, start, 28)
  length = 0
  if header[:4] == b'RIFF':
    length = int.from_bytes(header[4:8], 'little')
  elif header[:4] == b'FORM':
    length = int.from_bytes(header[4:8])
  elif header[:4] == b'RF64' and header[12:16] == b'ds64':
    length = int.from_bytes(header[20:28], 'little')
  unknown = length == 0xFFFFFFFF or start + length > size
  return start if unknown else start + length


def _opens(part: FilePart) -> bool:
  """Whether a decoder accepts the part as a recording.

  Raises:
    OSError: the part could not be read.
  """
  try:
    soundfile.SoundFile(part).close()
    return True
  except soundfile.LibsndfileError:
    part.seek(0)
  try:
    with open_container(part) as container:
      return bool(container.streams.audio)
  except av.FFmpegError:
    return False


def _part(file: BinaryIO, start: int, end: int) -> FilePart:
  """A part as it is, or with a length if it is a WAV file without one.

  Streaming writers, and recorders that were switched off, leave a data length of 0.
  """
  whole = FilePart(file, start, end)
  if _read_at(file, start, 4) != b'RIFF':
    return whole
  position = start + 12
  while position < end and len(chunk := _read_at(file, position, 16)) >= 8:
    name, length = struct.unpack('<4sI', chunk[:8])
    if name == b'data':
      if length or _is_chunk_header(chunk[8:], end - position - 16):
        return whole
      head = _read_at(file, start, position + 4 - start) + _UNKNOWN_LENGTH
      return FilePart(file, position + 8, end, head)
    position += 8 + length + length % 2
  return whole


def _is_chunk_header(header: bytes, rest: int) -> bool:
  """Whether 8 bytes are name and length of a WAV chunk, not samples."""
  has_name = re.match(rb'[ -~]{4}', header) is not None
  return has_name and int.from_bytes(header[4:], 'little') <= rest

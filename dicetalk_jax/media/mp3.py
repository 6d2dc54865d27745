"""The frames of an MP3 file, counted one by one.

libsndfile stops at the length that the header frame (Xing or Info) claims. Of a file
that was joined or extended later, this is only the beginning. Without a header frame,
or with Fraunhofer's (VBRI), which it reads as a frame of silence, it guesses the length
from the first frame. That fails at variable bit rates. Here all frames are counted, and
each recording in the file gets a header frame that claims them all if it has none.

FFmpeg does not replace this. Of two joined files it decodes the second header frame and
the encoder's delay as sound (0.06 s), or stops with an error at it.
"""

from collections.abc import Iterator
import re
import struct
from typing import BinaryIO, NamedTuple

from dicetalk_jax.media.file_part import FilePart

_KBITS_1 = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBITS_2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_KBITS = {3: _KBITS_1, 2: _KBITS_2, 0: _KBITS_2}  # MPEG-1, MPEG-2, MPEG-2.5
_RATE_SHIFT = {3: 0, 2: 1, 0: 2}
_RATES = (44100, 48000, 32000)
_LAYER_3 = 1
_MONO = 3
_INFO_KBITS = 4  # index of a bit rate whose frames have room for a header at all rates
_DECODER_DELAY = 529  # samples that libsndfile drops on top of the encoder's delay
_CHUNK = 1 << 16
_SEARCHED = 1 << 13  # bytes before the first frame at most, not counting tags
_IN_A_ROW = 4  # frames that random bytes do not hold by chance
# How files of other formats begin, which may hold MP3 frames as well.
_OTHERS = re.compile(
  rb'RIFF|riff|RF64|FORM|caff|fLaC|OggS|\x1a\x45\xdf\xa3|\0\0\x01\xba|.{4}ftyp',
  re.DOTALL,
)


class Frame(NamedTuple):
  """One MP3 frame: its place in the file and the contents of its four header bytes."""

  start: int
  header: bytes
  size: int  # bytes
  samples: int
  rate: int
  channels: int

  @property
  def end(self) -> int:
    return self.start + self.size

  @property
  def format(self) -> tuple[int, int]:
    return self.rate, self.channels

  @property
  def tag(self) -> int:
    """Offset of the letters Xing or Info, if this is a header frame."""
    if self.samples == 1152:
      return 21 if self.channels == 1 else 36
    return 13 if self.channels == 1 else 21


class _Run:
  """Frames of one format that follow each other, with the header frame before them."""

  def __init__(self, first: Frame, info: bytes | None):
    self.first = first
    self.info = info
    self.count = 0 if info else 1
    self.end = first.end

  def part(self, file: BinaryIO) -> FilePart:
    """The run as a file whose header frame counts all of it."""
    frame = self.first
    unchanged = FilePart(file, frame.start, self.end)
    if self.info is None:
      # Without a header frame the decoder expects the first frame's size of all.
      if (self.end - frame.start) // frame.size >= self.count:
        return unchanged
      # A frame of silence takes the place of the delay that decoders drop.
      delay = frame.samples - _DECODER_DELAY
      head = _info_frame(frame, self.count + 1, delay) + _empty_frame(frame, 0)
      return FilePart(file, frame.start, self.end, head)
    claimed, delay = _read_info(self.info)
    if claimed is not None and claimed >= self.count:
      return unchanged
    return FilePart(file, frame.end, self.end, _info_frame(frame, self.count, delay))


def is_mp3(file: BinaryIO) -> bool:
  """Whether the file begins with MP3 frames, after tags if there are any.

  Up to 8 KiB of other bytes may stand before the first frame, as decoders allow.
  """
  size = file.seek(0, 2)
  start = after_tags(file, 0)
  frame = _frame_at(file, start)
  if frame and _confirmed(file, frame, size):
    return True
  file.seek(start)
  if _OTHERS.match(file.read(8)):
    return False
  end = min(start + _SEARCHED, size)
  position = start
  while position < end:
    if _begins_row(file, position):
      return True
    position = _next_sync(file, position + 1, size)
  return False


def parts(file: BinaryIO) -> list[FilePart]:
  """Cuts an MP3 file at each header frame and wherever rate or channels change.

  Returns:
    one part after another; each claims exactly the frames that it holds, or more where
    the end of the file is missing.
  """
  runs: list[_Run] = []
  for frame in _frames(file):
    info = _info_of(file, frame)
    if not runs or info or frame.format != runs[-1].first.format:
      runs.append(_Run(frame, info))
    else:
      runs[-1].count += 1
      runs[-1].end = frame.end
  return [run.part(file) for run in runs if run.count]


def _frames(file: BinaryIO) -> Iterator[Frame]:
  """All whole frames; tags and damage between them are skipped."""
  size = file.seek(0, 2)
  position = 0
  last: Frame | None = None
  while position < size:
    frame = _frame_at(file, position)
    if frame and frame.end <= size and _is_frame(file, frame, last, size):
      yield frame
      position = frame.end
      last = frame
    elif (after := after_tags(file, position)) > position:
      position = after
    else:
      position = _next_sync(file, position + 1, size)


def _is_frame(file: BinaryIO, frame: Frame, last: Frame | None, size: int) -> bool:
  """Whether what looks like a frame follows another one or is confirmed otherwise."""
  if last and last.end == frame.start and last.format == frame.format:
    return True
  return _confirmed(file, frame, size)


def _confirmed(file: BinaryIO, frame: Frame, size: int) -> bool:
  """Whether another frame of the same format, a tag or the end of the file follows."""
  following = _frame_at(file, frame.end)
  if following:
    return following.format == frame.format
  return frame.end == size or after_tags(file, frame.end) > frame.end


def _begins_row(file: BinaryIO, position: int) -> bool:
  """Whether several frames of one format follow each other from `position` on."""
  formats = set()
  for _ in range(_IN_A_ROW):
    frame = _frame_at(file, position)
    if frame is None:
      return False
    formats.add(frame.format)
    position = frame.end
  return len(formats) == 1


def _frame_at(file: BinaryIO, position: int) -> Frame | None:
  file.seek(position)
  header = file.read(4)
  if len(header) < 4 or header[0] != 0xFF or header[1] < 0xE0:
    return None
  version = header[1] >> 3 & 3
  layer = header[1] >> 1 & 3
  if version not in _KBITS or layer != _LAYER_3:
    return None
  kbits = header[2] >> 4
  rate_index = header[2] >> 2 & 3
  if not 0 < kbits < 15 or rate_index == 3:
    return None
  rate = _RATES[rate_index] >> _RATE_SHIFT[version]
  samples = 1152 if version == 3 else 576
  padding = header[2] >> 1 & 1
  size = samples // 8 * 1000 * _KBITS[version][kbits - 1] // rate + padding
  channels = 1 if header[3] >> 6 == _MONO else 2
  return Frame(position, header, size, samples, rate, channels)


def _next_sync(file: BinaryIO, position: int, size: int) -> int:
  """The next position where a header or tag may begin."""
  while position < size:
    file.seek(position)
    chunk = file.read(_CHUNK)
    if found := re.search(rb'\xff[\xe0-\xff]|ID3|TAG|APETAGEX', chunk):
      return position + found.start()
    position += max(1, len(chunk) - 8)
  return size


def after_tags(file: BinaryIO, position: int) -> int:
  """The first byte after the ID3 and APE tags that begin at `position`."""
  while True:
    file.seek(position)
    tag = file.read(32)
    if re.match(rb'ID3[\2-\4].{2}[\0-\x7f]{4}', tag, re.DOTALL):
      length = sum(byte << shift for byte, shift in zip(tag[6:10], (21, 14, 7, 0)))
      position += 10 + length + (10 if tag[5] & 0x10 else 0)
    elif tag[:8] == b'APETAGEX' and len(tag) == 32:
      length, _, flags = struct.unpack('<III', tag[12:24])  # with the footer
      is_header = flags >> 29 & 1
      position += 32 + (length if is_header else 0)
    elif tag[:3] == b'TAG':
      position += 128
    else:
      return position


def _info_of(file: BinaryIO, frame: Frame) -> bytes | None:
  """A header frame from its letters on, or None for a frame of audio."""
  file.seek(frame.start + 4)
  content = file.read(frame.size - 4)
  blank = content[: frame.tag - 4]
  info = content[frame.tag - 4 :]
  if any(blank) or info[:4] not in (b'Xing', b'Info'):
    return None
  return info


def _read_info(info: bytes) -> tuple[int | None, int]:
  """The number of frames that a header frame claims, and the encoder's delay."""
  flags = int.from_bytes(info[4:8])
  claimed = int.from_bytes(info[8:12]) if flags & 1 else None
  # Number of frames, number of bytes, table of contents and quality are optional.
  lame = 8 + sum(size for bit, size in enumerate((4, 4, 100, 4)) if flags >> bit & 1)
  return claimed, int.from_bytes(info[lame + 21 : lame + 24]) >> 12


def _info_frame(frame: Frame, count: int, delay: int) -> bytes:
  """A header frame for `count` frames; nothing is dropped at their end."""
  info = b'Info' + struct.pack('>II', 1, count) + b'LAME3.100'.ljust(21, b'\0')
  info += (delay << 12).to_bytes(3)
  whole = bytearray(_empty_frame(frame, _INFO_KBITS))
  whole[frame.tag : frame.tag + len(info)] = info
  return bytes(whole)


def _empty_frame(frame: Frame, kbits: int) -> bytes:
  """A frame of silence in the format of `frame`."""
  version = frame.header[1] >> 3 & 3
  first, second, third, fourth = frame.header
  third = kbits + 1 << 4 | third & 0x0C  # without padding
  size = frame.samples // 8 * 1000 * _KBITS[version][kbits] // frame.rate
  return bytes([first, second | 1, third, fourth]).ljust(size, b'\0')  # without a CRC

"""The one decoder of audio: a file of any kind to blocks of samples."""

from collections.abc import Iterator
import itertools
import os
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import soundfile

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import joined
from dicetalk_jax.media.file_part import FilePart, open_container

_BLOCK = 1 << 16  # samples of all channels
_RATES = range(1000, 1_000_001)  # Hz; others are damage, or meant to fill the memory


class Block(NamedTuple):
  """A stretch of a recording.

  Attributes:
    samples: float32 `[samples,channels]`.
    rate: in Hz.
  """

  samples: np.ndarray
  rate: int


def open_recording(path: str | os.PathLike) -> BinaryIO:
  """Opens a file for `read_blocks`.

  Raises:
    InputError: the file is missing or cannot be read.
  """
  if not os.path.isfile(path):
    raise InputError(f'there is no recording at {path}; check the path')
  try:
    return open(path, 'rb')
  except OSError as error:
    raise _unreadable(path, error) from error


def read_blocks(file: BinaryIO, path: str | os.PathLike) -> Iterator[Block]:
  """Decodes a file in small blocks.

  Recordings that were joined into one file come one after another. Rate and channels
  may change from block to block.

  Args:
    file: from `open_recording`.
    path: its name, for messages.

  Raises:
    InputError: the audio cannot be read or decoded or holds numbers that are not
      finite.
  """
  try:
    for part in joined.parts(file):
      yield from _checked(part, path)
      if part.error:
        raise part.error
  except OSError as error:
    raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike, error: OSError) -> InputError:
  return InputError(
    f'{path} cannot be read ({error.strerror}); check its permissions and the disk'
  )


def _checked(part: FilePart, path: str | os.PathLike) -> Iterator[Block]:
  """The blocks of one recording."""
  try:
    for block in _decoded(part, path):
      if not np.isfinite(block.samples).all():
        raise InputError(
          f'the recording {path} holds samples that are not numbers; export it again'
        )
      if block.rate not in _RATES:
        raise InputError(
          f'the recording {path} claims {block.rate} samples per second; export it at '
          '48000'
        )
      yield block
  except (soundfile.LibsndfileError, av.FFmpegError) as error:
    raise InputError(
      f'{path} cannot be decoded as audio; '
      'check that it is whole, or convert it to wav, flac, mp3 or m4a'
    ) from (part.error or error)


class _ForwardReader(soundfile.SoundFile):
  """Reads block after block without seeking.

  By default soundfile seeks after each block to where it already is. That makes the
  decoder of MP3 forget the bits that it has kept for the next frame.
  """

  def seekable(self) -> bool:
    return False


def _decoded(part: FilePart, path: str | os.PathLike) -> Iterator[Block]:
  """The blocks of one recording by libsndfile, or else by FFmpeg.

  librosa reads with the same library. Its `load` holds all of a recording, and its
  `stream` repeats samples where the end of a file is missing.
  """
  try:
    file = _ForwardReader(part)
  except soundfile.LibsndfileError:
    part.seek(0)
    yield from _by_ffmpeg(part, path)
    return
  with file:
    rest = file.frames  # bytes after them may be a tag: do not decode it
    size = max(1, _BLOCK // file.channels)
    while rest > 0:
      block = file.read(min(rest, size), dtype='float32', always_2d=True)
      if not len(block):
        return  # the end of the file is missing
      yield Block(block, file.samplerate)
      rest -= len(block)


def _by_ffmpeg(part: FilePart, path: str | os.PathLike) -> Iterator[Block]:
  """The first audio track of a container (mp4, m4a, mkv, ...) or stream (aac)."""
  with open_container(part) as container:
    if not container.streams.audio:
      raise InputError(f'{path} has no audio track; give a recording of speech')
    track = container.decode(container.streams.audio[0])
    for audio_format, frames in itertools.groupby(track, _format):
      to_planar_float = av.AudioResampler(format='fltp')
      for frame in itertools.chain(frames, [None]):  # None gives the rest
        for out in to_planar_float.resample(frame):
          yield Block(out.to_ndarray().T, audio_format.rate)


class _Format(NamedTuple):
  samples: str
  layout: str
  rate: int


def _format(frame: av.AudioFrame) -> _Format:
  return _Format(frame.format.name, frame.layout.name, frame.sample_rate)

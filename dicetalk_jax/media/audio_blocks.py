"""The one decoder of audio: a file of any kind to blocks of samples."""

from collections.abc import Iterator
import itertools
import os
from typing import NamedTuple

import av
import numpy as np
import soundfile

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import joined
from dicetalk_jax.media.file_part import FilePart, open_container

_BLOCK = 1 << 16  # samples


def mono_blocks(path: str | os.PathLike) -> Iterator[tuple[np.ndarray, int]]:
  """Decodes a file in small blocks, and averages the channels.

  Recordings that were joined into one file come one after another.

  Yields:
    float32 `[samples]` and their rate, which may change from block to block.

  Raises:
    InputError: the file is missing, or its audio cannot be decoded or holds numbers
      that are not finite.
  """
  if not os.path.isfile(path):
    raise InputError(f'there is no recording at {path}; check the path')
  try:
    with open(path, 'rb') as file:
      for part in joined.parts(file):
        yield from _mono(part, path)
        if part.error:
          raise part.error
  except OSError as error:
    raise InputError(
      f'{path} cannot be read ({error.strerror}); check its permissions and the disk'
    ) from error


def _mono(part: FilePart, path: str | os.PathLike) -> Iterator[tuple[np.ndarray, int]]:
  """(float32 `[samples]`, rate) of one recording."""
  try:
    for block, rate in _decoded(part, path):
      if not np.isfinite(block).all():
        raise InputError(
          f'the recording {path} holds samples that are not numbers; export it again'
        )
      yield block.mean(axis=1), rate
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


def _decoded(
  part: FilePart, path: str | os.PathLike
) -> Iterator[tuple[np.ndarray, int]]:
  """(float32 `[samples,channels]`, rate) by libsndfile, or else by FFmpeg."""
  try:
    file = _ForwardReader(part)
  except soundfile.LibsndfileError:
    part.seek(0)
    yield from _by_ffmpeg(part, path)
    return
  with file:
    rest = file.frames  # bytes after them may be a tag: do not decode it
    while rest > 0:
      block = file.read(min(rest, _BLOCK), dtype='float32', always_2d=True)
      if not len(block):
        return  # the end of the file is missing
      yield block, file.samplerate
      rest -= len(block)


def _by_ffmpeg(
  part: FilePart, path: str | os.PathLike
) -> Iterator[tuple[np.ndarray, int]]:
  """The first audio track of a container (mp4, m4a, mkv, ...) or stream (aac)."""
  with open_container(part) as container:
    if not container.streams.audio:
      raise InputError(f'{path} has no audio track; give a recording of speech')
    track = container.decode(container.streams.audio[0])
    for audio_format, frames in itertools.groupby(track, _format):
      to_planar_float = av.AudioResampler(format='fltp')
      for frame in itertools.chain(frames, [None]):  # None gives the rest
        for out in to_planar_float.resample(frame):
          yield out.to_ndarray().T, audio_format.rate


class _Format(NamedTuple):
  samples: str
  layout: str
  rate: int


def _format(frame: av.AudioFrame) -> _Format:
  return _Format(frame.format.name, frame.layout.name, frame.sample_rate)

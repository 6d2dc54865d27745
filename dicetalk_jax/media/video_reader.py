"""Videos of any length and frame rate, one frame at a time and at a constant rate."""

from collections.abc import Iterator
import contextlib
import fractions
import os
from typing import NamedTuple

import av
import numpy as np

from dicetalk_jax.errors import InputError
from dicetalk_jax.media.file_part import FilePart, open_container
from dicetalk_jax.media.image import MAX_PIXELS

_TIE = 1e-6  # seconds; time stamps that are meant to be equal differ by less


class VideoInfo(NamedTuple):
  """The header of a video.

  Attributes:
    fps: frames per second on average.
    height, width: of the frames as they are shown: upright, with square pixels.
    sound_delay: seconds from the first frame to the first audio sample; None without
      an audio track.
  """

  fps: float
  height: int
  width: int
  sound_delay: float | None


def probe(path: str | os.PathLike) -> VideoInfo:
  """Reads the header of a video.

  Raises:
    InputError: the file is missing, damaged or not a video.
  """
  with open_video(path) as (container, stream):
    fps = _average_rate(stream)
    if fps is None:
      raise InputError(f'{path} has no frame rate; convert it to MP4')
    height, width = _square_pixels(stream, stream.height, stream.width)
    if next(container.decode(stream)).rotation % 180 == 90:
      height, width = width, height
    delay = None
    if container.streams.audio:
      delay = _start_time(container.streams.audio[0]) - _start_time(stream)
    return VideoInfo(fps, height, width, delay)


def frames(
  path: str | os.PathLike,
  fps: float = 25.0,
  start: float = 0.0,
  count: int | None = None,
) -> Iterator[np.ndarray]:
  """Reads frames at a constant rate: extra ones are dropped, missing ones repeated.

  Frame k is the last one that is due before `start + (k + 1/2) / fps`, FFmpeg's rule
  for `-r`. Only one is held in memory. See `shown` for their shape.

  Args:
    path: a video file.
    fps: rate of the result.
    start: seconds after the first frame of the file.
    count: number of frames; None for all, which is the duration times `fps`, rounded.
      Fewer come where the file ends before.

  Yields:
    uint8 `[H,W,3]`.

  Raises:
    InputError: the file is missing, damaged or not a video.
  """
  done = 0
  with open_video(path) as (container, stream):
    for frame, until in _shown_until(path, container, stream, fps, start):
      pixels = None
      while done != count and (done + 0.5) / fps <= until + _TIE:
        if pixels is None:
          pixels = shown(frame, stream)
        done += 1
        yield pixels
      if done == count:
        return


def _shown_until(
  path: str | os.PathLike,
  container: av.container.InputContainer,
  stream: av.VideoStream,
  fps: float,
  start: float,
) -> Iterator[tuple[av.VideoFrame, float]]:
  """All frames from the key frame before `start` on, and until when each is shown.

  That time is relative to `start`: when the next frame comes, or for the last one the
  end of the video, rounded to frames.
  """
  last = None
  end = 0.0
  origin = _start_time(stream)
  if start > 0:
    container.seek(int((origin + start) / _time_base(stream)), stream=stream)
  for frame in decoded(path, container, stream):
    time = end if frame.time is None else frame.time - origin - start
    if last is not None:
      yield last, time
    last = frame
    end = time + _duration(frame, stream)
  total = round(end * fps)
  if last is None or total <= 0:
    raise InputError(f'{path} holds no frames at {start:g} s; give a whole video file')
  yield last, (total - 0.5) / fps


@contextlib.contextmanager
def open_video(
  path: str | os.PathLike,
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
  """Opens a video; gives the container and its first video track.

  Raises:
    InputError: the file is missing, damaged or not a video, or its frames have more
      than `MAX_PIXELS`.
  """
  if not os.path.isfile(path):
    raise InputError(f'video {path} does not exist; check the path')
  try:
    with open(path, 'rb') as file, open_container(FilePart.whole(file)) as container:
      if not container.streams.video:
        raise InputError(f'{path} holds no frames; give a video file')
      stream = container.streams.video[0]
      height, width = _square_pixels(stream, stream.height, stream.width)
      if height * width > MAX_PIXELS:
        raise InputError(
          f'{path} has frames of {width}x{height} pixels; scale it down to a few '
          'thousand a side'
        )
      # Frames may have another size than the header says.
      stream.codec_context.options = {'max_pixels': str(MAX_PIXELS)}
      yield container, stream
  except (av.error.FFmpegError, OSError, StopIteration) as error:
    raise InputError(f'{path} cannot be read as a video; is it whole?') from error


def decoded(
  path: str | os.PathLike,
  container: av.container.InputContainer,
  stream: av.VideoStream,
) -> Iterator[av.VideoFrame]:
  """The frames of a track, as they are stored.

  Raises:
    InputError: the file is cut off.
  """
  for packet in container.demux(stream):
    if packet.is_corrupt:
      raise InputError(f'{path} breaks off in the middle; copy or download it again')
    yield from packet.decode()


def shown(frame: av.VideoFrame, stream: av.VideoStream) -> np.ndarray:
  """The pixels of a frame as players show it, uint8 `[H,W,3]`.

  Pixels that are not square are stretched, and the rotation that phones note is
  applied.
  """
  height, width = _square_pixels(stream, frame.height, frame.width)
  if (height, width) == (frame.height, frame.width):
    pixels = frame.to_ndarray(format='rgb24')
  else:
    pixels = frame.to_ndarray(
      format='rgb24', height=height, width=width, interpolation='LANCZOS'
    )
  return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))


def _square_pixels(stream: av.VideoStream, height: int, width: int) -> tuple[int, int]:
  """Height and width after one of them grew until pixels are square."""
  aspect = stream.sample_aspect_ratio  # width / height of a pixel
  if not aspect or aspect == 1:
    return height, width
  if aspect > 1:
    return height, round(width * aspect)
  return round(height / aspect), width


def _average_rate(stream: av.VideoStream) -> float | None:
  """Frames per second."""
  rate = stream.average_rate or stream.guessed_rate
  return float(rate) if rate else None


def _time_base(stream: av.VideoStream | av.AudioStream) -> fractions.Fraction:
  """Seconds per tick; only streams that are being made may not have one yet."""
  assert stream.time_base is not None
  return stream.time_base


def _start_time(stream: av.VideoStream | av.AudioStream) -> float:
  """Seconds."""
  return float((stream.start_time or 0) * _time_base(stream))


def _duration(frame: av.VideoFrame, stream: av.VideoStream) -> float:
  """Seconds; by the average rate where the frame does not say."""
  if frame.duration and frame.time_base:
    return float(frame.duration * frame.time_base)
  rate = _average_rate(stream)
  return 1 / rate if rate else 0.0

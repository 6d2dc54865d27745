"""Videos of any length and frame rate, one picture at a time and at a constant rate."""

from collections.abc import Iterator
import contextlib
import os
from typing import NamedTuple

import av
import numpy as np

from dicetalk_jax.errors import InputError
from dicetalk_jax.media.file_part import FilePart, open_container

_TIE = 1e-6  # seconds; time stamps that are meant to be equal differ by less


class VideoInfo(NamedTuple):
  """What the header of a video says."""

  fps: float  # on average
  height: int  # of the decoded picture
  width: int
  sound_delay: (
    float | None
  )  # seconds from the first picture to the first sample; None: no sound track


def probe(path: str | os.PathLike) -> VideoInfo:
  """Reads the header of a video.

  Raises:
    InputError: the file is missing, is no video or is damaged.
  """
  with _opened(path) as (container, stream):
    starts = [
      float((s.start_time or 0) * s.time_base)
      for s in (stream, *container.streams.audio[:1])
    ]
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
      raise InputError(f'{path} has no frame rate; convert it to MP4')
    turned = next(container.decode(stream)).rotation % 180 == 90
    height, width = (
      (stream.width, stream.height) if turned else (stream.height, stream.width)
    )
    return VideoInfo(
      float(rate), height, width, starts[1] - starts[0] if len(starts) > 1 else None
    )


def frames(
  path: str | os.PathLike,
  fps: float = 25.0,
  start: float = 0.0,
  count: int | None = None,
) -> Iterator[np.ndarray]:
  """Pictures at constant rate: those in between are dropped, missing ones repeat the
  one before.

  Picture k is the last one that is due before `start + (k + 1/2) / fps`, FFmpeg's rule
  for `-r`. Only one is held in memory. Phones' rotation is applied.

  Args:
    path: a video file.
    fps: rate of the result.
    start: seconds after the first picture of the file.
    count: number of pictures; None for all, which is the duration times `fps`, rounded.
      Fewer come where the file ends before.

  Yields:
    uint8 `[H,W,3]`.

  Raises:
    InputError: the file is missing, is no video or is damaged.
  """
  shown, done, end = None, 0, 0.0

  def due(time: float) -> Iterator[np.ndarray]:
    """What is shown until the picture of that time comes, relative to `start`."""
    nonlocal done
    pixels = None
    while shown is not None and done != count and (done + 0.5) / fps <= time + _TIE:
      pixels = _upright(shown) if pixels is None else pixels
      done += 1
      yield pixels

  with _opened(path) as (container, stream):
    origin = float((stream.start_time or 0) * stream.time_base)
    if start > 0:
      container.seek(
        int((origin + start) / stream.time_base), stream=stream
      )  # to the key frame before
    for packet in container.demux(stream):
      if packet.is_corrupt:
        raise InputError(f'{path} breaks off in the middle; copy or download it again')
      for frame in packet.decode():
        time = end if frame.time is None else frame.time - origin - start
        yield from due(time)
        if done == count:
          return
        shown, end = (
          frame,
          time
          + float((frame.duration or 0) * frame.time_base or 1 / stream.average_rate),
        )
  total = round(end * fps)
  if shown is None or total <= 0:
    raise InputError(
      f'{path} holds no pictures at {start:g} s; give a whole video file'
    )
  yield from due((min(total, count or total) - 0.5) / fps)


@contextlib.contextmanager
def _opened(
  path: str | os.PathLike,
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
  if not os.path.isfile(path):
    raise InputError(f'video {path} does not exist; check the path')
  try:
    with open(path, 'rb') as file, open_container(FilePart.whole(file)) as container:
      if not container.streams.video:
        raise InputError(f'{path} holds no pictures; give a video file')
      yield container, container.streams.video[0]
  except (av.error.FFmpegError, OSError, StopIteration) as error:
    raise InputError(f'{path} cannot be read as a video; is it whole?') from error


def _upright(frame: av.VideoFrame) -> np.ndarray:
  return np.ascontiguousarray(
    np.rot90(frame.to_ndarray(format='rgb24'), frame.rotation // 90)
  )

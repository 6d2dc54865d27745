"""MP4 files in and out: H.264 video and AAC audio, frame-exact and in sync."""

from collections.abc import Iterator, Mapping
import fractions
import heapq
import os
from typing import NamedTuple

import av
from av.video.reformatter import ColorRange, Colorspace, Interpolation
import numpy as np

from dicetalk_jax.errors import InputError
from dicetalk_jax.files import atomic_file
from dicetalk_jax.media.audio import RATE, begin_at, load_span
from dicetalk_jax.media.file_part import FilePart, open_container
from dicetalk_jax.media.video_reader import probe

# Where a video comes from, noted in every file by default.
AI_GENERATED = {'comment': 'AI-generated', 'ai_generated': 'true'}

# H.264 quality: that of the reference implementation's last encoding, and the worst.
CRF = 18
MAX_CRF = 51

_BT709 = 1  # the code point of BT.709 for matrix, primaries and transfer alike
_AAC_CHUNK = 1024


class Video(NamedTuple):
  """A video in memory.

  Attributes:
    frames: uint8 [N,H,W,3].
    fps: frames per second.
    audio: float32 [round(N / fps * 16000)], mono, or None.
  """

  frames: np.ndarray
  fps: float
  audio: np.ndarray | None


def fit_length(audio: np.ndarray, samples: int) -> np.ndarray:
  """Cuts `audio` [n] or pads it with silence to [samples]."""
  return np.pad(audio[:samples], (0, max(0, samples - len(audio))))


def write_video(
  path: str | os.PathLike,
  frames: np.ndarray,
  fps: float,
  audio: np.ndarray | None = None,
  *,
  sample_rate: int = RATE,
  size: tuple[int, int] | None = None,
  crf: int = CRF,
  metadata: Mapping[str, str] = AI_GENERATED,
) -> None:
  """Writes an MP4 with constant frame rate; the file appears only when it is whole.

  Args:
    path: where; must end in `.mp4`. Missing folders are made.
    frames: uint8 [N,H,W,3]. Odd sizes grow by one repeated row or column, as 4:2:0
      chroma wants.
    fps: frames per second; frame i is shown from i / fps on.
    audio: float [samples] in [-1,1], mono; cut or padded with silence to the length of
      the frames.
    sample_rate: of `audio`, in Hz; one that AAC knows (8000 ... 96000).
    size: (width, height) to scale the frames to, bicubic, both even; None: their own.
    crf: H.264 quality, 0 ... 51; smaller is better and larger on disk. 18 is visually
      lossless.
    metadata: tags of the file; by default they say that it was generated.

  Raises:
    InputError: the path cannot be written.
  """
  if not str(path).lower().endswith('.mp4'):
    raise InputError(f'{path}: videos are written as MP4; end the name in .mp4')
  frames = np.asarray(frames)
  is_video = frames.ndim == 4 and frames.shape[-1] == 3 and frames.size
  if frames.dtype != np.uint8 or not is_video:
    raise ValueError(
      f'frames must be uint8 [N,H,W,3] and not empty, not {frames.dtype} '
      f'{list(frames.shape)}'
    )
  odd_row, odd_column = frames.shape[1] % 2, frames.shape[2] % 2
  frames = np.pad(frames, [(0, 0), (0, odd_row), (0, odd_column), (0, 0)], mode='edge')
  rate = fractions.Fraction(fps).limit_denominator(1001)

  with (
    atomic_file(path) as part,
    av.open(
      os.path.abspath(part),
      'w',
      format='mp4',
      options={'movflags': 'use_metadata_tags+faststart'},
    ) as container,
  ):
    container.metadata.update(metadata)
    tracks = [_encode_frames(container, frames, rate, size, crf)]
    if audio is not None:
      samples = round(len(frames) / rate * sample_rate)
      wave = fit_length(np.asarray(audio, np.float32), samples).clip(-1, 1)
      tracks.append(_encode_audio(container, wave, sample_rate))
    container.start_encoding()
    for packet in heapq.merge(*tracks, key=_decoding_time):
      container.mux(packet)


def read_video(path: str | os.PathLike) -> Video:
  """Reads all frames, and the first audio track as 16 kHz mono.

  The audio is cut or padded with silence to the length of the frames.

  Raises:
    InputError: the file is missing, damaged or not a video.
  """
  if not os.path.isfile(path):
    raise InputError(f'video {path} does not exist; check the path')
  decoded: list[np.ndarray] = []
  try:
    with open(path, 'rb') as file, open_container(FilePart.whole(file)) as container:
      if not container.streams.video:
        raise InputError(f'{path} holds no frames; give a video file')
      stream = container.streams.video[0]
      stream.thread_type = 'AUTO'
      rate = stream.average_rate or stream.guessed_rate
      for packet in container.demux(stream):
        if packet.is_corrupt:
          raise InputError(
            f'{path} breaks off in the middle; copy or download it again'
          )
        decoded += [frame.to_ndarray(format='rgb24') for frame in packet.decode()]
  except (av.error.FFmpegError, OSError) as error:
    raise InputError(
      f'{path} cannot be read as a video ({error.strerror}); is it whole?'
    ) from error
  if not decoded or not rate:
    raise InputError(f'{path} holds no frames; give a video file')

  frames = np.stack(decoded)
  delay = probe(path).sound_delay
  if delay is None:
    return Video(frames, float(rate), None)
  wave = begin_at(load_span(path), -delay)
  return Video(frames, float(rate), fit_length(wave, round(len(frames) / rate * RATE)))


def _decoding_time(packet: av.Packet) -> fractions.Fraction:
  """Seconds; the encoders here give every packet a time."""
  assert packet.dts is not None
  return packet.dts * packet.time_base


def _encode_frames(
  container: av.container.OutputContainer,
  frames: np.ndarray,
  rate: fractions.Fraction,
  size: tuple[int, int] | None,
  crf: int,
) -> Iterator[av.Packet]:
  """Adds the track at once; the packets come as they are asked for."""
  stream = container.add_stream('libx264', rate=rate, options={'crf': str(crf)})
  height, width = frames.shape[1:3]
  stream.width, stream.height = size or (width, height)
  stream.pix_fmt = 'yuv420p'
  context = stream.codec_context
  context.time_base = 1 / rate
  context.colorspace = context.color_primaries = context.color_trc = _BT709
  context.color_range = ColorRange.MPEG

  def packets():
    for i, pixels in enumerate(frames):
      rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format='rgb24')
      frame = rgb.reformat(
        stream.width,
        stream.height,
        'yuv420p',
        dst_colorspace=Colorspace.ITU709,
        interpolation=Interpolation.BICUBIC if size else None,
      )
      frame.pts = i
      frame.time_base = 1 / rate
      yield from stream.encode(frame)
    yield from stream.encode(None)

  return packets()


def _encode_audio(
  container: av.container.OutputContainer, audio: np.ndarray, sample_rate: int
) -> Iterator[av.Packet]:
  """Adds the track at once; the packets come as they are asked for."""
  stream = container.add_stream('aac', rate=sample_rate, layout='mono')

  def packets():
    for start in range(0, len(audio), _AAC_CHUNK):
      samples = audio[None, start : start + _AAC_CHUNK]
      chunk = av.AudioFrame.from_ndarray(samples, format='fltp', layout='mono')
      chunk.sample_rate = sample_rate
      chunk.pts = start
      chunk.time_base = fractions.Fraction(1, sample_rate)
      yield from stream.encode(chunk)
    yield from stream.encode(None)

  return packets()

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
from dicetalk_jax.media import video_reader
from dicetalk_jax.media.audio import RATE, begin_at, load_span
from dicetalk_jax.media.soundtrack import Soundtrack

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
  audio: np.ndarray | Soundtrack | None = None,
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
    audio: float [samples] in [-1,1], mono, or a recording with its own rate and
      channels; cut or padded with silence to the length of the frames.
    sample_rate: of an array, in Hz; one that AAC knows (8000 ... 96000).
    size: (width, height) to scale the frames to, bicubic, both even; None: their own.
    crf: H.264 quality, 0 ... 51; smaller is better and larger on disk. 18 is visually
      lossless.
    metadata: tags of the file; by default they say that it was generated.

  Raises:
    InputError: the path cannot be written, or the recording cannot be read.
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
      tracks.append(_encode_audio(container, audio, sample_rate, len(frames) / rate))
    container.start_encoding()
    for packet in heapq.merge(*tracks, key=_decoding_time):
      container.mux(packet)


def read_video(path: str | os.PathLike) -> Video:
  """Reads all frames as they are shown, and the first audio track as 16 kHz mono.

  The audio is cut or padded with silence to the length of the frames.

  Raises:
    InputError: the file is missing, damaged or not a video.
  """
  with video_reader.open_video(path) as (container, stream):
    stream.thread_type = 'AUTO'
    rate = stream.average_rate or stream.guessed_rate
    decoded = [
      video_reader.shown(frame, stream)
      for frame in video_reader.decoded(path, container, stream)
    ]
  if not decoded or not rate:
    raise InputError(f'{path} holds no frames; give a video file')

  frames = np.stack(decoded)
  delay = video_reader.probe(path).sound_delay
  if delay is None:
    return Video(frames, float(rate), None)
  seconds = len(frames) / rate
  wave = begin_at(load_span(path, end=max(0, seconds - delay)), -delay)
  return Video(frames, float(rate), fit_length(wave, round(seconds * RATE)))


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
  container: av.container.OutputContainer,
  audio: np.ndarray | Soundtrack,
  sample_rate: int,
  seconds: fractions.Fraction,
) -> Iterator[av.Packet]:
  """Adds the track at once; the packets come as they are asked for."""
  layout = 'mono'
  if isinstance(audio, Soundtrack):
    sample_rate, layout = audio.rate, audio.layout
    chunks = audio.chunks()
  else:
    chunks = iter([np.asarray(audio, np.float32)[None]])
  stream = container.add_stream('aac', rate=sample_rate, layout=layout)
  count = round(seconds * sample_rate)

  def packets():
    for start, samples in _equal_chunks(chunks, count, stream.channels):
      chunk = av.AudioFrame.from_ndarray(samples.clip(-1, 1), 'fltp', layout)
      chunk.sample_rate = sample_rate
      chunk.pts = start
      chunk.time_base = fractions.Fraction(1, sample_rate)
      yield from stream.encode(chunk)
    yield from stream.encode(None)

  return packets()


def _equal_chunks(
  chunks: Iterator[np.ndarray], count: int, channels: int
) -> Iterator[tuple[int, np.ndarray]]:
  """Cuts sound to `count` samples, or adds silence, in chunks as AAC wants them.

  Args:
    chunks: float32 `[channels,n]`, of any length.
    count: samples in all.
    channels: of the sound.

  Yields:
    the number of the first sample, and float32 `[channels,1024]`; the last is shorter.
  """
  held = np.zeros((channels, 0), np.float32)
  for start in range(0, count, _AAC_CHUNK):
    size = min(_AAC_CHUNK, count - start)
    while held.shape[1] < size:
      silence = np.zeros((channels, size - held.shape[1]), np.float32)
      held = np.concatenate([held, next(chunks, silence)], axis=1)
    yield start, np.ascontiguousarray(held[:, :size])
    held = held[:, size:]

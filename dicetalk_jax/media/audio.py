"""Audio files become 16 kHz waves, Whisper's input, and its states around each frame.

Clocks: 16000 samples, 100 mel frames, 50 Whisper positions, 25 units of `audio_len`,
and (with step 2) 12.5 video frames per second.
"""

from collections.abc import Callable, Iterator
import functools
import itertools
import math
import operator
import os
import sys
import threading
import types
from typing import NamedTuple
import warnings

import numpy as np

from dicetalk_jax.errors import InputError, Note
from dicetalk_jax.media.audio_blocks import Block, open_recording, read_blocks
from dicetalk_jax.media.mixdown import Mixdown

RATE = 16000  # samples per second
WINDOW = 30 * RATE  # samples per Whisper window
HOP = 160  # samples per mel frame
FFT = 400  # samples per analysis window of the STFT
MEL_SHAPE = (WINDOW // HOP, 80)  # mel frames of a Whisper window, and bands
UNIT = 640  # samples per unit of `audio_len`
CLIP = 10  # Whisper positions around a video frame, see `window_positions`
LONGEST = 3 * 3600  # seconds that are held in memory at most, 0.7 GB
SILENCE = 1e-3  # peak (-60 dB) below which a recording counts as silent

_PIECE = 8.0  # seconds that are resampled at a time
_MARGIN = 0.1  # seconds around them, far more than the filter sees


class SilentError(InputError):
  """A recording is silent from beginning to end."""


class Recording(NamedTuple):
  """A recording as the networks hear it.

  Attributes:
    wave: float32 `[samples]` in [-1,1], 16 kHz mono.
    loudest: the channel that was taken where channels cancel each other out, by number
      of channels; empty for usual recordings.
  """

  wave: np.ndarray
  loudest: dict[int, int]


def load_audio(path: str | os.PathLike) -> np.ndarray:
  """Reads the audio of an audio or video file.

  The samples equal those of `librosa.load`, which the reference implementation uses, to
  rounding. Channels are averaged; where that would cancel them out, the loudest is
  taken, and a `Note` says so. Files that hold more than their header says are read
  whole: joined recordings one after another, each at its own rate.

  Args:
    path: anything libsndfile or FFmpeg decodes (wav, flac, ogg, mp3, m4a, mp4, ...). Of
      several audio tracks the first is read, from its first sample on.

  Returns:
    float32 `[samples]` in [-1,1], 16 kHz mono.

  Raises:
    InputError: the file is missing, its audio cannot be decoded, is empty, is longer
      than `LONGEST`, holds numbers that are not finite or (SilentError) is silent.
  """
  return load_recording(path).wave


def load_recording(path: str | os.PathLike) -> Recording:
  """Reads as `load_audio` does, and says which channels were used."""
  recording = _load(path, 0.0, LONGEST + 1)
  wave = recording.wave
  if not wave.size:
    raise InputError(f'the recording {path} is empty; give one with speech')
  if len(wave) > LONGEST * RATE:
    raise InputError(
      f'the recording {path} is longer than {LONGEST / 3600:g} hours; cut it into parts'
    )
  if np.abs(wave).max() < SILENCE:
    raise SilentError(f'the recording {path} is silent; give one with speech')
  return recording


def load_span(
  path: str | os.PathLike, start: float = 0.0, end: float = math.inf
) -> np.ndarray:
  """Reads from `start` to `end` seconds and keeps nothing else in memory.

  The samples equal those of `load_audio`. (Whether channels cancel each other out is
  judged by what comes before `end`.) Decoding always begins with the file, since few
  codecs give the same samples after a jump.

  Returns:
    float32 `[samples]` in [-1,1], 16 kHz mono; fewer where the recording ends before.
    Silent and empty ones are returned as they are.

  Raises:
    InputError: the file is missing, or its audio cannot be decoded or holds numbers
      that are not finite.
  """
  return _load(path, start, end).wave


def _load(path: str | os.PathLike, start: float, end: float) -> Recording:
  """See `load_span`."""
  mixdown = Mixdown()
  wave = _cut(path, mixdown, start, end)
  loudest = mixdown.cancelled()
  if loudest:
    numbers = ' and '.join(str(channel + 1) for channel in loudest.values())
    warnings.warn(
      f'the channels of {path} cancel each other out; only the loudest is used, '
      f'channel {numbers}',
      Note,
      stacklevel=3,
    )
    wave = _cut(path, Mixdown(loudest), start, end)
  return Recording(wave, loudest)


def _cut(
  path: str | os.PathLike, mixdown: Mixdown, start: float, end: float
) -> np.ndarray:
  """The samples from `start` to `end`, 16 kHz."""
  first = round(start * RATE)
  last = sys.maxsize if math.isinf(end) else round(end * RATE)
  kept = [np.zeros(0, np.float32)]
  done = 0
  with open_recording(path) as file:
    for wave in _waves(read_blocks(file, path), mixdown):
      part = wave[max(0, first - done) : max(0, last - done)]
      if len(part):
        kept.append(part.copy())  # a view would keep the whole block
      done += len(wave)
      if done >= last:
        break
  return np.concatenate(kept)


def _waves(blocks: Iterator[Block], mixdown: Mixdown) -> Iterator[np.ndarray]:
  """The recording in blocks: float32 `[samples]`, 16 kHz mono."""
  for rate, group in itertools.groupby(blocks, operator.attrgetter('rate')):
    waves = (mixdown(block.samples) for block in group)
    if rate == RATE:
      yield from waves
    else:
      yield from _resampled(waves, rate)


def _resampled(waves: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
  """Blocks at 16 kHz from blocks at `rate`, by librosa.

  A long recording is resampled in pieces, so that it need not be in memory. They begin
  where a sample of one rate coincides with one of the other, and the filter sees what
  lies around them: the result is that of the whole, to rounding.
  """
  import librosa  # the import takes seconds

  common = math.gcd(rate, RATE)
  period, period_out = rate // common, RATE // common

  def whole_periods(seconds: float) -> int:
    return math.ceil(seconds * rate / period)

  def resample(wave: np.ndarray) -> np.ndarray:
    return librosa.resample(wave, orig_sr=rate, target_sr=RATE, res_type='soxr_hq')

  piece, margin = whole_periods(_PIECE), whole_periods(_MARGIN)
  before = 0  # periods of `held` that came out already
  held = np.zeros(0, np.float32)
  for wave in waves:
    held = np.concatenate([held, wave])
    while len(held) >= (before + piece + margin) * period:
      out = resample(held[: (before + piece + margin) * period])
      yield out[before * period_out : (before + piece) * period_out]
      held = held[(before + piece - margin) * period :]
      before = margin
  if len(held) > before * period:
    yield resample(held)[before * period_out :]


def begin_at(wave: np.ndarray, seconds: float) -> np.ndarray:
  """Cuts a 16 kHz wave before that time, or puts silence in front of it if negative."""
  samples = round(seconds * RATE)
  return np.pad(wave, (max(0, -samples), 0))[max(0, samples) :]


def audio_len(samples: int) -> int:
  """Length of a 16 kHz wave in units of 25 Hz.

  Half of it, rounded down, is the number of video frames at step 2.
  """
  return samples // UNIT


# transformers fails when two threads import from it for the first time.
_importing = threading.Lock()


@functools.cache
def _mel_filters() -> np.ndarray:
  """Whisper's filters, `[201,80]`."""
  return _audio_utils().mel_filter_bank(
    num_frequency_bins=FFT // 2 + 1,
    num_mel_filters=MEL_SHAPE[1],
    min_frequency=0.0,
    max_frequency=RATE / 2,
    sampling_rate=RATE,
    norm='slaney',
    mel_scale='slaney',
  )


def _audio_utils() -> types.ModuleType:
  # Without PyTorch it would warn that it has no models; none are used.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  with _importing:
    from transformers import audio_utils  # the import takes seconds
  return audio_utils


def log_mel(wave: np.ndarray) -> np.ndarray:
  """Whisper's log-mel spectrogram of each window of 30 s, the last padded with zeros.

  Args:
    wave: float32 `[samples]`, 16 kHz.

  Returns:
    float32 `[windows,3000,80]`.
  """
  return np.stack(
    [_log_mel_window(wave[i : i + WINDOW]) for i in range(0, len(wave), WINDOW)]
  )


def _log_mel_window(wave: np.ndarray) -> np.ndarray:
  """`[3000,80]`; the arithmetic is that of `WhisperFeatureExtractor` without torch."""
  # All columns of pure padding are equal: compute one of them and repeat it.
  samples = min(WINDOW, HOP * -(-(len(wave) + FFT) // HOP))
  mel = _audio_utils().spectrogram(
    np.pad(wave, (0, samples - len(wave))),
    _audio_utils().window_function(FFT, 'hann'),
    frame_length=FFT,
    hop_length=HOP,
    power=2.0,
    mel_filters=_mel_filters(),
    log_mel='log10',
  )
  mel = mel[:, :-1].T  # Whisper leaves out the last
  mel = np.maximum(mel, mel.max() - 8)  # 80 dB below the loudest
  mel = (mel + 4) / 4
  return np.pad(mel, ((0, WINDOW // HOP - len(mel)), (0, 0)), mode='edge')


def window_positions(frames: np.ndarray, clip: int = CLIP) -> np.ndarray:
  """The Whisper positions around video frames: what a frame hears.

  Position `2f` is the first of frame f; `clip/2-1` positions lie before it.

  Args:
    frames: int `[F]`, at 25 per second.
    clip: even, positions around a frame.

  Returns:
    int `[F,clip]`; the first are negative and the last beyond the recording for frames
    at its ends, where there is silence.
  """
  return 2 * frames[:, None] - _positions_before(clip) + np.arange(clip)


def _positions_before(clip: int) -> int:
  return clip // 2 - 1


def pad_states(states: np.ndarray, audio_len: int, clip: int = CLIP) -> np.ndarray:
  """Joins Whisper's windows, cuts them to the recording and pads them with zeros.

  Args:
    states: `[windows,1500,S,D]`.
    audio_len: length of the recording in 25 Hz units.
    clip: even, positions that every frame shall have around it.

  Returns:
    `[2*audio_len+clip,S,D]`, with `clip/2-1` zero positions in front.
  """
  states = np.asarray(states)
  joined = states.reshape(-1, *states.shape[2:])
  if len(joined) < 2 * audio_len:
    raise ValueError(
      f'{len(joined)} positions cannot hold a recording of {audio_len} units'
    )
  before = _positions_before(clip)
  return np.pad(joined[: 2 * audio_len], ((before, clip - before), (0, 0), (0, 0)))


def audio_windows(
  padded: np.ndarray,
  step: int = 2,
  start: int = 0,
  frames: int | None = None,
  clip: int = CLIP,
) -> np.ndarray:
  """The Whisper positions around each video frame.

  Args:
    padded: `[2*audio_len+clip,S,D]`, from `pad_states`.
    step: 25 Hz units per video frame; 2 gives the 12.5 frames per second of the
      reference implementation.
    start: first video frame.
    frames: number of video frames; None for all from `start`.
    clip: positions around a frame, as in `pad_states`.

  Returns:
    `[frames,clip,S,D]`; frame i holds positions `2*step*i` to `2*step*i+clip-1` of
    `padded`.
  """
  if frames is None:
    frames = (len(padded) - clip) // (2 * step) - start
  positions = window_positions(step * (start + np.arange(frames)), clip)
  return padded[positions + _positions_before(clip)]


def read_windows(
  read: Callable[[slice], np.ndarray], count: int, frames: np.ndarray, clip: int = CLIP
) -> np.ndarray:
  """The Whisper positions around chosen frames, reading no others.

  Args:
    read: reads a slice of the recording's positions, `[n,S,D]`.
    count: number of positions of the recording; beyond it there are zeros.
    frames: int `[F]`, ascending, at 25 per second.
    clip: positions around a frame.

  Returns:
    float32 `[F,clip,S,D]`.
  """
  positions = window_positions(frames, clip)
  start, stop = int(positions[0, 0]), int(positions[-1, -1]) + 1
  known = read(slice(max(start, 0), min(stop, count)))
  states = np.zeros((stop - start, *known.shape[1:]), np.float32)
  states[max(start, 0) - start :][: len(known)] = known
  return states[positions - start]

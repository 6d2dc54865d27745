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
from typing import Any

import numpy as np
import soxr

from dicetalk_jax.errors import InputError
from dicetalk_jax.media.audio_blocks import mono_blocks

RATE = 16000  # samples per second
WINDOW = 30 * RATE  # samples per Whisper window
HOP = 160  # samples per mel frame
FFT = 400  # samples per analysis window of the STFT
MEL_SHAPE = (WINDOW // HOP, 80)  # mel frames of a Whisper window, and bands
UNIT = 640  # samples per unit of `audio_len`
CLIP = 10  # Whisper positions around a video frame, see `window_positions`
SILENCE = 1e-3  # peak (-60 dB) below which a recording counts as silent


class SilentError(InputError):
  """A recording is silent from beginning to end."""


def load_audio(path: str | os.PathLike) -> np.ndarray:
  """Reads the audio of an audio or video file.

  The samples equal librosa's, which the reference implementation uses: channels are
  averaged, and soxr resamples at high quality. Files that hold more than their header
  says are read whole: joined recordings one after another, each at its own rate.

  Args:
    path: anything libsndfile or FFmpeg decodes (wav, flac, ogg, mp3, m4a, mp4, ...). Of
      several audio tracks the first is read, from its first sample on.

  Returns:
    float32 `[samples]` in [-1,1], 16 kHz mono.

  Raises:
    InputError: the file is missing, its audio cannot be decoded, is empty, holds
      numbers that are not finite or (SilentError) is silent.
  """
  wave = load_span(path)
  if not wave.size:
    raise InputError(f'the recording {path} is empty; give one with speech')
  if np.abs(wave).max() < SILENCE:
    raise SilentError(f'the recording {path} is silent; give one with speech')
  return wave


def load_span(
  path: str | os.PathLike, start: float = 0.0, end: float = math.inf
) -> np.ndarray:
  """Reads from `start` to `end` seconds and keeps nothing else in memory.

  The samples equal those of `load_audio`. Decoding always begins with the file, since
  few codecs give the same samples after a jump.

  Returns:
    float32 `[samples]` in [-1,1], 16 kHz mono; fewer where the recording ends before.
    Silent and empty ones are returned as they are.

  Raises:
    InputError: the file is missing, or its audio cannot be decoded or holds numbers
      that are not finite.
  """
  first = round(start * RATE)
  last = sys.maxsize if math.isinf(end) else round(end * RATE)
  kept = [np.zeros(0, np.float32)]
  done = 0
  for wave in _waves(path):
    part = wave[max(0, first - done) : max(0, last - done)]
    if len(part):
      kept.append(part.copy())  # a view would keep the whole block
    done += len(wave)
    if done >= last:
      break
  return np.concatenate(kept)


def _waves(path: str | os.PathLike) -> Iterator[np.ndarray]:
  """The recording in blocks: float32 `[samples]`, 16 kHz mono."""
  for rate, blocks in itertools.groupby(mono_blocks(path), operator.itemgetter(1)):
    waves = (wave for wave, _ in blocks)
    if rate == RATE:
      yield from waves
    else:
      yield from _resampled(waves, rate)


def _resampled(waves: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
  """Blocks at 16 kHz from blocks at `rate`, with as many samples as librosa gives."""
  stream = soxr.ResampleStream(rate, RATE, 1, dtype='float32', quality='HQ')
  samples_in = 0
  samples_out = 0
  for wave in waves:
    samples_in += len(wave)
    resampled = stream.resample_chunk(wave)
    samples_out += len(resampled)
    yield resampled
  rest = -(-samples_in * RATE // rate) - samples_out
  resampled = stream.resample_chunk(np.zeros(0, np.float32), last=True)[:rest]
  yield np.pad(resampled, (0, rest - len(resampled)))


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
def _extractor() -> Any:
  with _importing:
    from transformers import WhisperFeatureExtractor  # the import takes seconds
  return WhisperFeatureExtractor()


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
  # All columns of pure padding are equal: compute one of them and repeat it. The
  # extractor's NumPy path is named because its public call switches to torch where that
  # is installed, with slightly other results.
  samples = min(WINDOW, HOP * -(-(len(wave) + FFT) // HOP))
  padded = np.pad(wave, (0, samples - len(wave)))
  mel = _extractor()._np_extract_fbank_features([padded], device='cpu')[0].T
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

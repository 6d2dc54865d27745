"""Sound files to 16 kHz waves, log-mel windows for Whisper, and its states cut per video frame.

Clocks: 16000 samples, 100 mel frames, 50 Whisper positions, 25 units of `audio_len`, and (with step 2) 12.5 video
frames per second.
"""

from collections.abc import Iterator
import functools
import itertools
import os
import threading

import numpy as np

from dicetalk_jax.errors import InputError

RATE = 16000  # samples per second
WINDOW = 30 * RATE  # samples per Whisper window
HOP = 160  # samples per mel frame
FFT = 400  # samples per analysis window of the STFT
MEL_SHAPE = (WINDOW // HOP, 80)  # mel frames of a Whisper window, and bands
UNIT = 640  # samples per unit of `audio_len`
CLIP = 10  # Whisper positions around a video frame; one less than half of them lie before its own
SILENCE = 1e-3  # peak (-60 dB) below which a recording counts as silent


class SilentError(InputError):
  """A recording holds nothing but silence."""


def load_audio(path: str | os.PathLike) -> np.ndarray:
  """Reads the sound of an audio or video file.

  The published reading, librosa's: channels averaged, resampled by soxr at high quality.

  Args:
    path: anything libsndfile or FFmpeg decodes (wav, flac, ogg, mp3, m4a, mp4, ...).

  Returns:
    float32 `[samples]` in [-1,1], 16 kHz mono.

  Raises:
    InputError: the file is missing, holds no sound that can be decoded, is empty or (SilentError) silent.
  """
  if not os.path.isfile(path):
    raise InputError(f'There is no recording at {path}; check the path.')
  wave, rate = _decode(path)
  wave = wave.mean(axis=1)
  if not wave.size:
    raise InputError(f'The recording {path} is empty; give one with speech.')
  if not np.isfinite(wave).all():
    raise InputError(f'The recording {path} holds samples that are not numbers; export it again.')
  if rate != RATE:
    wave = _resample(wave, rate)
  if np.abs(wave).max() < SILENCE:
    raise SilentError(f'The recording {path} is silent; give one with speech.')
  return wave


def load_span(path: str | os.PathLike, start: float, end: float) -> np.ndarray:
  """What `load_audio` reads from `start` to `end` seconds, equal to the sample, while nothing else is held in memory.

  Decoding begins with the file all the same: few codecs give the same samples after a jump.

  Returns:
    float32 `[samples]` in [-1,1], 16 kHz mono; fewer where the recording ends before. Silence is no error here.

  Raises:
    InputError: the file holds no sound that can be decoded.
  """
  first, last = round(start * RATE), round(end * RATE)
  kept, done, read, stream = [], 0, 0, None

  def keep(wave: np.ndarray):
    nonlocal done
    if len(part := wave[max(0, first - done):max(0, last - done)]):
      kept.append(part.copy())  # a view would hold the block
    done += len(wave)

  for block, rate in _blocks(path):
    read += len(block)
    wave = block.mean(axis=1)
    if rate != RATE:
      import soxr
      stream = stream or soxr.ResampleStream(rate, RATE, 1, dtype='float32', quality='HQ')
      wave = stream.resample_chunk(wave)
    keep(wave)
    if done >= last:
      break
  else:
    if stream:
      rest = -(-read * RATE // rate) - done  # as `_resample` counts
      wave = stream.resample_chunk(np.zeros(0, np.float32), last=True)[:rest]
      keep(np.pad(wave, (0, rest - len(wave))))
  wave = np.concatenate(kept) if kept else np.zeros(0, np.float32)
  if not np.isfinite(wave).all():
    raise InputError(f'The recording {path} holds samples that are not numbers; export it again.')
  return wave


def _blocks(path: str | os.PathLike) -> Iterator[tuple[np.ndarray, int]]:
  """(float32 `[samples,channels]`, rate) of one part after another."""
  import soundfile
  try:
    file = soundfile.SoundFile(path)
  except soundfile.LibsndfileError:
    yield from _ffmpeg_blocks(path)
    return
  try:
    with file:
      for block in file.blocks(1 << 16, dtype='float32', always_2d=True):
        yield block, file.samplerate
  except soundfile.LibsndfileError as error:
    raise InputError(f'{path} cannot be decoded as sound; convert it to wav, flac, mp3 or m4a.') from error


def _decode(path: str | os.PathLike) -> tuple[np.ndarray, int]:
  """float32 `[samples,channels]` at the rate of the file."""
  import soundfile
  try:
    return soundfile.read(path, dtype='float32', always_2d=True)
  except soundfile.LibsndfileError:
    parts = list(_ffmpeg_blocks(path))
    if not parts:
      return np.zeros((0, 1), np.float32), RATE
    return np.concatenate([block.T for block, _ in parts], axis=1).T, parts[0][1]


def _ffmpeg_blocks(path: str | os.PathLike) -> Iterator[tuple[np.ndarray, int]]:
  """`_blocks` of the first sound track of a container that libsndfile does not know (mp4, m4a, mkv, ...)."""
  import av
  try:
    # A playlist must not make the decoder fetch addresses.
    with av.open(os.fspath(path), options={'protocol_whitelist': 'file'}) as container:
      if not container.streams.audio:
        raise InputError(f'{path} has no sound track; give a recording of speech.')
      stream = container.streams.audio[0]
      planar = av.AudioResampler(format='fltp')
      for frame in itertools.chain(container.decode(stream), [None]):  # None gives what is left
        for out in planar.resample(frame):
          yield out.to_ndarray().T, stream.rate
  except av.FFmpegError as error:
    raise InputError(f'{path} cannot be decoded as sound; convert it to wav, flac, mp3 or m4a.') from error


def _resample(wave: np.ndarray, rate: int) -> np.ndarray:
  import soxr
  samples = -(-len(wave) * RATE // rate)
  wave = soxr.resample(wave, rate, RATE, quality='HQ')[:samples]
  return np.pad(wave, (0, samples - len(wave)))


def begin_at(wave: np.ndarray, seconds: float) -> np.ndarray:
  """A 16 kHz wave from that time on; before its beginning there is silence."""
  samples = round(seconds * RATE)
  return np.pad(wave, (max(0, -samples), 0))[max(0, samples):]


def audio_len(samples: int) -> int:
  """Length in 25 Hz units of a 16 kHz wave; half of it, rounded down, is the number of video frames at step 2."""
  return samples // UNIT


_importing = threading.Lock()  # transformers fails when two threads import from it for the first time


@functools.cache
def _extractor():
  with _importing:
    from transformers import WhisperFeatureExtractor  # the import takes seconds
  return WhisperFeatureExtractor()


def log_mel(wave: np.ndarray) -> np.ndarray:
  """Whisper's log-mel spectrogram of each window of 30 s, the last one padded with zeros.

  Args:
    wave: float32 `[samples]`, 16 kHz.

  Returns:
    float32 `[windows,3000,80]`.
  """
  return np.stack([_log_mel_window(wave[i:i + WINDOW]) for i in range(0, len(wave), WINDOW)])


def _log_mel_window(wave: np.ndarray) -> np.ndarray:
  # All columns of pure padding are equal: compute one of them and repeat it. The extractor's NumPy path is named
  # because its public call switches to torch where that is installed, with slightly other results.
  samples = min(WINDOW, HOP * -(-(len(wave) + FFT) // HOP))
  padded = np.pad(wave, (0, samples - len(wave)))
  mel = _extractor()._np_extract_fbank_features([padded], device='cpu')[0].T
  return np.pad(mel, ((0, WINDOW // HOP - len(mel)), (0, 0)), mode='edge')


def pad_states(states: np.ndarray, audio_len: int, clip: int = CLIP) -> np.ndarray:
  """Joins the windows of Whisper's states, cuts them to the recording and pads both ends with zeros.

  Args:
    states: `[windows,1500,S,D]`.
    audio_len: length of the recording in 25 Hz units.
    clip: even, positions that every frame is to have around it.

  Returns:
    `[2*audio_len+clip,S,D]`, with `clip/2-1` zero positions in front.
  """
  states = np.asarray(states)
  joined = states.reshape(-1, *states.shape[2:])
  if len(joined) < 2 * audio_len:
    raise ValueError(f'{len(joined)} positions cannot hold a recording of {audio_len} units')
  return np.pad(joined[:2 * audio_len], ((clip // 2 - 1, clip // 2 + 1), (0, 0), (0, 0)))


def audio_windows(padded: np.ndarray, step: int = 2, start: int = 0, frames: int | None = None,
                  clip: int = CLIP) -> np.ndarray:
  """The Whisper positions around each video frame.

  Args:
    padded: `[2*audio_len+clip,S,D]`, from `pad_states`.
    step: 25 Hz units per video frame; 2 is the published 12.5 frames per second.
    start: first video frame.
    frames: number of video frames; None for all from `start`.
    clip: positions around a frame, as in `pad_states`.

  Returns:
    `[frames,clip,S,D]`; frame i holds positions `2*step*i` to `2*step*i+clip-1` of `padded`.
  """
  if frames is None:
    frames = (len(padded) - clip) // (2 * step) - start
  first = 2 * step * (start + np.arange(frames))
  return padded[first[:, None] + np.arange(clip)]

"""Formant synthesiser: speaks words at 16 kHz, with an exact track of phonemes.

There is no recursive filter: the voice is a sum of harmonics whose amplitudes follow
the formants, plus noise bands, plus the bursts of stops. All of them are decided at
`CONTROL_RATE` and interpolated.
"""

import dataclasses

import numpy as np

from data_pipelines.synthetic import phonemes
from dicetalk_jax.data.clip_record import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME

CONTROL_RATE = 200  # ticks per second of every control track
_HOP = SAMPLE_RATE // CONTROL_RATE  # samples per tick
_LEAD = 0.120  # seconds of silence before the sentence
_TAIL = 0.150  # after it

# F1, F2, F3 in Hz of a neutral male tract: steady states of vowels, loci of consonants.
_FORMANTS = {
  'AA': (730, 1090, 2440),
  'AE': (660, 1720, 2410),
  'AH': (640, 1190, 2390),
  'AO': (570, 840, 2410),
  'EH': (530, 1840, 2480),
  'ER': (490, 1350, 1690),
  'IH': (390, 1990, 2550),
  'IY': (270, 2290, 3010),
  'OW': (450, 880, 2380),
  'UH': (440, 1020, 2240),
  'UW': (300, 870, 2240),
  'AX': (500, 1500, 2500),
  'L': (380, 1050, 2650),
  'R': (350, 1150, 1500),
  'W': (300, 680, 2200),
  'Y': (270, 2250, 3000),
  'HH': (500, 1500, 2500),
  'SIL': (500, 1500, 2500),
  **dict.fromkeys(('P', 'B', 'M'), (280, 850, 2250)),
  **dict.fromkeys(('F', 'V'), (320, 1050, 2300)),
  **dict.fromkeys(('T', 'D', 'N'), (300, 1750, 2650)),
  **dict.fromkeys(('S', 'Z'), (320, 1700, 2600)),
  **dict.fromkeys(('TH', 'DH'), (320, 1400, 2600)),
  **dict.fromkeys(('SH', 'CH', 'JH'), (300, 1900, 2450)),
  **dict.fromkeys(('K', 'G', 'NG'), (300, 2000, 2200)),
}
_F4 = 3500.0
_BANDWIDTH = np.array([80.0, 110.0, 160.0, 250.0])

_VOICING = {
  **dict.fromkeys(phonemes.VOWELS, 1.0),
  **dict.fromkeys(('L', 'R', 'W', 'Y'), 0.6),
  **dict.fromkeys(('M', 'N', 'NG'), 0.45),
  **dict.fromkeys(('B', 'D', 'G'), 0.12),
  **dict.fromkeys(('V', 'DH'), 0.3),
  'Z': 0.22,
  'JH': 0.15,
}

# Amplitudes of four noise bands with these edges in Hz.
_BANDS = ((500, 2000), (1500, 3500), (2800, 5500), (4800, 7800))
_NOISE = {
  'S': (0, 0, 0.05, 0.35),
  'Z': (0, 0, 0.03, 0.18),
  'SH': (0, 0.12, 0.30, 0.12),
  'CH': (0, 0.12, 0.30, 0.12),
  'JH': (0, 0.06, 0.15, 0.06),
  'F': (0, 0.05, 0.06, 0.06),
  'V': (0, 0.02, 0.03, 0.03),
  'TH': (0, 0.02, 0.05, 0.07),
  'DH': (0, 0.01, 0.02, 0.03),
  'HH': (0.10, 0.08, 0.04, 0.01),
}
_BURST = {
  'P': (0.20, 0.10, 0.05, 0.02),
  'B': (0.12, 0.05, 0.02, 0),
  'T': (0, 0.08, 0.20, 0.25),
  'D': (0, 0.05, 0.12, 0.12),
  'K': (0.05, 0.28, 0.12, 0.04),
  'G': (0.04, 0.16, 0.06, 0.02),
}
_BURST_SECONDS = 0.022


@dataclasses.dataclass(frozen=True)
class Voice:
  """A speaker: base F0 in Hz and the factor on all formants."""

  f0: float
  tract: float


@dataclasses.dataclass(frozen=True)
class Prosody:
  """Manner of speaking; semitones relative to the speaker."""

  rate: float = 1.0
  pitch: float = 0.0
  span: float = 3.0
  tilt: float = 1.0
  gain: float = 0.8


_PROSODY = {
  'neutral': Prosody(),
  'angry': Prosody(1.12, 3.0, 5.0, 0.75, 1.0),
  'contempt': Prosody(0.90, -1.5, 2.5, 1.05, 0.70),
  'disgusted': Prosody(0.85, -1.0, 4.0, 0.95, 0.75),
  'fear': Prosody(1.20, 5.0, 3.0, 1.0, 0.70),
  'happy': Prosody(1.10, 4.0, 6.0, 0.90, 0.90),
  'sad': Prosody(0.75, -2.5, 1.2, 1.30, 0.55),
  'surprised': Prosody(1.05, 6.0, 7.0, 0.90, 0.90),
}


def prosody(emotion: str, intensity: float) -> Prosody:
  """Gives the prosody of an emotion, between neutral (intensity 0) and full (1)."""
  neutral = dataclasses.astuple(_PROSODY['neutral'])
  full = dataclasses.astuple(_PROSODY[emotion])
  return Prosody(*(x + intensity * (y - x) for x, y in zip(neutral, full)))


@dataclasses.dataclass(frozen=True)
class Utterance:
  """Speech with its truth.

  The intervals (start_s, end_s, phoneme) tile [0, duration].
  """

  audio: np.ndarray  # float32 [frames * 640]
  intervals: tuple[tuple[float, float, str], ...]

  @property
  def duration(self) -> float:
    return len(self.audio) / SAMPLE_RATE

  @property
  def frames(self) -> int:
    return len(self.audio) // SAMPLES_PER_FRAME


def hann_smooth(track: np.ndarray, seconds: float) -> np.ndarray:
  """Smooths control tracks [..., ticks] with a Hann kernel of the given full width.

  Beyond the ends, their values are repeated.
  """
  reach = max(1, round(seconds * CONTROL_RATE / 2)) - 1
  kernel = np.hanning(2 * reach + 3)[1:-1]
  kernel /= kernel.sum()
  padded = np.pad(track, [(0, 0)] * (track.ndim - 1) + [(reach, reach)], mode='edge')
  return np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=-1) @ kernel


def rasterise(intervals, ticks: int, rate: float = CONTROL_RATE) -> np.ndarray:
  """Gives the index into PHONEMES at the centre of each tick: int32 [ticks]."""
  ends = np.array([end for _, end, _ in intervals])
  codes = np.array([phonemes.INDEX[p] for _, _, p in intervals], np.int32)
  which = np.searchsorted(ends, (np.arange(ticks) + 0.5) / rate, side='right')
  return codes[np.minimum(which, len(codes) - 1)]


def synthesise(
  words: tuple[str, ...], voice: Voice, manner: Prosody, rng: np.random.Generator
) -> Utterance:
  """Speaks `words`.

  All randomness (durations, contour, jitter, noise) comes from `rng`.
  """
  intervals, ticks = _schedule(words, manner.rate, rng)
  codes = rasterise(intervals, ticks)
  f0 = _pitch(ticks, voice, manner, rng)
  formants = (
    hann_smooth(_table(_FORMANTS, (500, 1500, 2500))[codes].T, 0.065) * voice.tract
  )
  voicing = hann_smooth(_table(_VOICING, 0.0)[codes], 0.030)
  wave = _voice(f0, formants, voicing, manner.tilt, voice.tract)
  wave += _frication(codes, intervals, rng)
  wave = np.tanh(0.16 * manner.gain * wave)
  return Utterance(wave.astype(np.float32), intervals)


def _table(values: dict, default) -> np.ndarray:
  """Makes a dict by phoneme an array by phoneme index."""
  return np.array([values.get(p, default) for p in phonemes.PHONEMES], np.float64)


def _schedule(
  words, rate: float, rng
) -> tuple[tuple[tuple[float, float, str], ...], int]:
  """Gives phoneme intervals and the number of ticks, for whole video frames."""
  track = phonemes.pronounce(words)
  names = ['SIL', *(p for p, _ in track), 'SIL']
  spoken = (
    np.array([ms for _, ms in track]) / 1000 * rng.uniform(0.85, 1.2, len(track)) / rate
  )
  bounds = np.concatenate(
    [[0.0], np.cumsum(np.concatenate([[_LEAD], spoken, [_TAIL]]))]
  )
  frames = int(np.ceil(bounds[-1] * FPS))
  bounds[-1] = frames / FPS
  bounds = bounds.tolist()
  return tuple(zip(bounds[:-1], bounds[1:], names)), frames * CONTROL_RATE // FPS


def _pitch(ticks: int, voice: Voice, manner: Prosody, rng) -> np.ndarray:
  """Makes F0 in Hz per tick.

  It has a declination of 2 semitones, a slow contour of the manner's span, and 0.4 %
  jitter.
  """
  time = np.arange(ticks) / CONTROL_RATE
  knots = rng.uniform(-0.5, 0.5, int(time[-1] / 0.28) + 3) * manner.span
  contour = hann_smooth(np.interp(time, np.arange(len(knots)) * 0.28, knots), 0.25)
  semitones = manner.pitch + contour + 1.0 - 2.0 * time / time[-1]
  return voice.f0 * 2 ** (semitones / 12) * (1 + 0.004 * rng.standard_normal(ticks))


def _voice(f0, formants, voicing, tilt: float, tract: float) -> np.ndarray:
  """Makes the voiced part at the sample rate.

  It is sum_k voicing(t) H(k f0(t)) k^-tilt sin(k phi(t)) for k f0 < 7.4 kHz.
  """
  ramp = np.arange(_HOP) / _HOP

  def upsample(x):
    return (x[:-1, None] + (x[1:] - x[:-1])[:, None] * ramp).ravel()

  def hold(x):
    return np.append(x, x[-1])

  phase = np.cumsum(upsample(hold(f0))) * (2 * np.pi / SAMPLE_RATE)
  k = np.arange(1, int(7400 / f0.min()) + 1)[:, None]
  frequency = k * f0  # [harmonics, ticks]
  response = np.ones_like(frequency)
  for centre, width in zip((*formants, np.full_like(f0, _F4 * tract)), _BANDWIDTH):
    response *= centre**2 / np.sqrt(
      (centre**2 - frequency**2) ** 2 + (width * frequency) ** 2
    )
  amplitude = voicing * response * k**-tilt * (frequency < 7400)
  # By the recurrence sin((k+1) phi) = 2 cos(phi) sin(k phi) - sin((k-1) phi).
  twice_cos, before, sine = 2 * np.cos(phase), np.zeros_like(phase), np.sin(phase)
  wave = np.zeros_like(phase)
  for harmonic in amplitude:
    wave += upsample(hold(harmonic)) * sine
    before, sine = sine, twice_cos * sine - before
  return wave


def _frication(codes, intervals, rng) -> np.ndarray:
  """Makes the unvoiced part at the sample rate.

  It has band noise under the envelopes of fricatives, and a decaying burst at the end
  of each stop.
  """
  samples = len(codes) * _HOP
  envelopes = np.repeat(
    hann_smooth(_table(_NOISE, (0, 0, 0, 0))[codes].T, 0.025), _HOP, axis=-1
  )
  burst = np.exp(-np.arange(int(_BURST_SECONDS * SAMPLE_RATE)) / (0.007 * SAMPLE_RATE))
  for _, end, phoneme in intervals:
    if phoneme in _BURST:
      stop = round(end * SAMPLE_RATE)
      envelopes[:, stop - len(burst) : stop] += (
        np.array(_BURST[phoneme])[:, None] * burst
      )
  spectrum = np.fft.rfft(rng.standard_normal(samples))
  hertz = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
  bands = np.stack(
    [
      np.fft.irfft(spectrum * ((hertz >= low) & (hertz < high)), samples)
      for low, high in _BANDS
    ]
  )
  bands /= bands.std(axis=-1, keepdims=True)
  return 4 * (envelopes * bands).sum(0)

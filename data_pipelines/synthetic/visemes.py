"""Turns phonemes into mouth shapes, and mixes them with the emotional mouth.

Phonemes have viseme targets, which coarticulation blends.
"""

import dataclasses

import numpy as np

from data_pipelines.synthetic import phonemes, speech
from dicetalk_jax.data.clip_record import FPS

CHANNELS = ('jaw', 'wide', 'round', 'press', 'fv', 'tongue')
JAW, WIDE, ROUND, PRESS, FV, TONGUE = range(6)
BILABIALS = ('P', 'B', 'M')

# phonemes: jaw, wide, round, tongue, weight in the coarticulation average
_TARGETS = {
  'SIL': (0, 0, 0, 0, 0.8),
  'AA': (0.85, 0, 0, 0, 1),
  'AE': (0.75, 0.35, 0, 0, 1),
  'AH': (0.50, 0, 0, 0, 1),
  'AO': (0.65, 0, 0.55, 0, 1),
  'EH': (0.50, 0.35, 0, 0.1, 1),
  'ER': (0.35, 0, 0.35, 0.3, 1),
  'IH': (0.28, 0.45, 0, 0.2, 1),
  'IY': (0.20, 0.75, 0, 0.3, 1),
  'OW': (0.45, 0, 0.85, 0, 1),
  'UH': (0.28, 0, 0.6, 0, 1),
  'UW': (0.20, 0, 1, 0, 1.3),
  'AX': (0.30, 0.05, 0.05, 0.1, 0.6),
  **dict.fromkeys(('P', 'B', 'M'), (0, 0, 0, 0, 3)),
  **dict.fromkeys(('F', 'V'), (0.08, 0.1, 0, 0, 3)),
  **dict.fromkeys(('T', 'D', 'N'), (0.17, 0.1, 0, 0.5, 0.6)),
  'L': (0.28, 0.1, 0, 0.9, 1),
  **dict.fromkeys(('S', 'Z'), (0.08, 0.3, 0, 0.2, 1.3)),
  **dict.fromkeys(('SH', 'CH', 'JH'), (0.12, 0, 0.6, 0.2, 1.5)),
  **dict.fromkeys(('TH', 'DH'), (0.18, 0.1, 0, 1, 1)),
  **dict.fromkeys(('K', 'G', 'NG'), (0.28, 0.1, 0, 0, 0.35)),
  'HH': (0.35, 0.1, 0, 0, 0.15),
  'R': (0.22, 0, 0.5, 0.2, 1),
  'W': (0.12, 0, 0.95, 0, 1.6),
  'Y': (0.18, 0.55, 0, 0.3, 1),
}
_TABLE = np.array([_TARGETS[p] for p in phonemes.PHONEMES])
# Full widths of the smoothing windows in seconds.
_VOWEL_WINDOW = 0.140
_CONTACT_WINDOW = 0.055
_ACTIVITY_WINDOW = 0.300


@dataclasses.dataclass(frozen=True)
class VisemeTrack:
  """Mouth shape at the frame centres (i + .5) / 25 s."""

  viseme: np.ndarray  # float32 [N, 6], see CHANNELS, each in [0, 1]
  activity: np.ndarray  # float32 [N], 1 while speaking, 0 in silence
  phoneme: np.ndarray  # int32 [N], index into PHONEMES


def viseme_track(utterance: speech.Utterance) -> VisemeTrack:
  """Makes coarticulated visemes.

  Slow channels are a weighted average over 140 ms; lip contacts are faster and
  saturate. A closure of 60 ms can fall between two frames, so the frame nearest to the
  middle of every bilabial is closed.
  """
  frames = utterance.frames
  codes = speech.rasterise(utterance.intervals, frames * speech.CONTROL_RATE // FPS)
  targets, weight = _TABLE[codes, :4].T, _TABLE[codes, 4]
  slow = speech.hann_smooth(targets * weight, _VOWEL_WINDOW) / speech.hann_smooth(
    weight, _VOWEL_WINDOW
  )
  press, fv = (
    speech.hann_smooth(
      np.isin(codes, [phonemes.INDEX[p] for p in group]).astype(float), _CONTACT_WINDOW
    )
    for group in (BILABIALS, ('F', 'V'))
  )
  silence = speech.hann_smooth(
    (codes == phonemes.INDEX['SIL']).astype(float), _ACTIVITY_WINDOW
  )
  jaw, wide, rounded, tongue = slow
  ticks = np.stack([jaw, wide, rounded, 1.35 * press, 1.2 * fv, tongue, 1.0 - silence])
  centres = (np.arange(frames) + 0.5) / FPS
  tick_times = (np.arange(ticks.shape[-1]) + 0.5) / speech.CONTROL_RATE
  sampled = (
    np.stack([np.interp(centres, tick_times, t) for t in ticks], axis=-1)
    .clip(0, 1)
    .astype(np.float32)
  )
  for frame in closure_frames(utterance):
    sampled[frame, PRESS] = 1.0
  return VisemeTrack(
    sampled[:, :6], sampled[:, 6], speech.rasterise(utterance.intervals, frames, FPS)
  )


def closure_frames(utterance: speech.Utterance) -> list[int]:
  """Lists the frame nearest to the middle of every P, B and M."""
  return [
    min(int(0.5 * (start + end) * FPS), utterance.frames - 1)
    for start, end, p in utterance.intervals
    if p in BILABIALS
  ]


def mix(
  au26, au25, viseme: np.ndarray, activity, gain: float
) -> tuple[np.ndarray, np.ndarray]:
  """Mixes jaw and lip parting of an emotional mouth with speech.

  Args:
    au26, au25: emotional jaw drop and lip parting, [N].
    viseme: [N, 6].
    activity: [N].
    gain: how widely this person opens the mouth in this emotion.

  Returns:
    (jaw, parting), [N] each; both are 0 wherever `press` is 1.
  """
  jaw_emotion = au26 * (1 - 0.65 * activity)
  jaw = jaw_emotion + gain * viseme[:, JAW] * (1 - 0.25 * jaw_emotion)
  contact = (1 - viseme[:, PRESS]) * (1 - 0.75 * viseme[:, FV])
  return np.minimum(1.25, jaw) * contact, au25 * (1 - 0.75 * activity) * (
    1 - viseme[:, PRESS]
  )

"""How well lips follow the audio: mouth opening against a reference, over shifts."""

from typing import NamedTuple

import numpy as np


class LipSync(NamedTuple):
  """Scores of one clip.

  Attributes:
    correlation: Pearson correlation without a shift, in [-1,1] (Sync-r).
    offset: shift in frames at which the correlation is largest; positive where the lips
      come after the audio.
    offset_seconds: the same in seconds.
    confidence: largest correlation minus the median over all shifts (Sync-conf); near 0
      where lips and audio are unrelated.
  """

  correlation: float
  offset: int
  offset_seconds: float
  confidence: float


def lip_sync(
  opening: np.ndarray, truth: np.ndarray, fps: float, max_shift: float = 0.4
) -> LipSync:
  """Compares the mouth of a clip with the truth, or with what the audio asks for.

  c(L) = corr(opening[t + L], truth[t]), after SyncNet's offset and confidence (Chung
  and Zisserman, 2016), with the known opening in place of learned embeddings. A mouth
  that never moves has correlation 0 everywhere.

  Args:
    opening: [N] mouth opening seen in the clip.
    truth: [N] reference.
    fps: frames per second of both.
    max_shift: largest shift in seconds either way; clips should last five times as
      long.

  Raises:
    ValueError: lengths differ, or are too short for the shifts.
  """
  opening = np.asarray(opening, np.float64)
  truth = np.asarray(truth, np.float64)
  largest = round(max_shift * fps)
  if opening.shape != truth.shape or opening.ndim != 1:
    raise ValueError(
      f'opening {opening.shape} and truth {truth.shape} must be two tracks of one '
      'length'
    )
  if len(opening) < largest + 3:
    raise ValueError(
      f'{len(opening)} frames are too few for shifts of {largest} frames'
    )
  shifts = np.arange(-largest, largest + 1)
  scores = np.array([_correlation(*_shifted(opening, truth, int(s))) for s in shifts])
  best = np.lexsort((np.abs(shifts), -scores))[0]  # of equal scores the smallest shift
  offset = int(shifts[best])
  return LipSync(
    float(scores[largest]),
    offset,
    offset / fps,
    float(scores[best] - np.median(scores)),
  )


def _shifted(
  opening: np.ndarray, truth: np.ndarray, shift: int
) -> tuple[np.ndarray, np.ndarray]:
  """The parts of both that overlap when the opening comes `shift` frames later."""
  if shift >= 0:
    return opening[shift:], truth[: len(truth) - shift]
  return opening[:shift], truth[-shift:]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
  a = a - a.mean()
  b = b - b.mean()
  norm = np.sqrt((a @ a) * (b @ b))
  return float(a @ b / norm) if norm > 1e-12 else 0.0

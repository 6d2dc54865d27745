"""Sync-C and Sync-D of SyncNet (Chung and Zisserman, 2016) from its embeddings.

For the evaluation of generated videos, which does not call it yet; training does not.
"""

from typing import NamedTuple

import numpy as np

MAX_SHIFT = 15  # frames either way


class Sync(NamedTuple):
  """Scores of one clip.

  Attributes:
    confidence: Sync-C, median minus minimum of the mean distances over all shifts;
      higher is better.
    distance: Sync-D, their minimum; lower is better.
    offset: shift in frames that has it; positive where the audio comes after the lips.
  """

  confidence: float
  distance: float
  offset: int


def sync_scores(
  lips: np.ndarray, audio: np.ndarray, max_shift: int = MAX_SHIFT
) -> Sync:
  """Compares windows of lips with the audio up to `max_shift` frames earlier and later.

  d(s) = mean_t |lips[t] - audio[t + s]|, Euclidean; beyond its ends the audio is zero,
  as in the published evaluation.

  Args:
    lips: `[N,D]` embeddings of windows of five frames, one for each frame at 25 fps.
    audio: `[N,D]` embeddings of the audio of the same windows.
    max_shift: frames.

  Raises:
    ValueError: the shapes differ, or there is no window.
  """
  lips = np.asarray(lips, np.float64)
  audio = np.asarray(audio, np.float64)
  if lips.ndim != 2 or lips.shape != audio.shape or not len(lips):
    raise ValueError(
      f'lips {lips.shape} and audio {audio.shape} must be of one shape [N,D], N at '
      'least 1'
    )
  padded = np.pad(audio, ((max_shift, max_shift), (0, 0)))
  means = np.array(
    [
      np.linalg.norm(lips - padded[shift : shift + len(lips)], axis=1).mean()
      for shift in range(2 * max_shift + 1)
    ]
  )
  return Sync(
    float(np.median(means) - means.min()),
    float(means.min()),
    int(means.argmin()) - max_shift,
  )

"""Priors of data sets: the mean Gaussian of each emotion (paper section 4.1, the
prompt), and of each of its levels.
"""

from collections.abc import Sequence

import numpy as np

from dicetalk_jax.bundle import Prior
from dicetalk_jax.data.clip_record import UNKNOWN
from dicetalk_jax.data.clip_source import ClipTable
from dicetalk_jax.data.feature_store import Feature
from dicetalk_jax.errors import DataError

NEUTRAL = 'neutral'  # has no levels


def averaged_clips(
  tables: Sequence[ClipTable], by_intensity: bool = False
) -> dict[str, np.ndarray]:
  """Chooses the clips that each prior is the mean of; arguments as of `mean_gaussians`.

  Returns:
    Emotion to bool `[clips]`, over the clips of all data sets.

  Raises:
    DataError: no clip has a label.
  """
  emotions = np.concatenate([table.emotion for table in tables])
  intensity = np.concatenate([table.intensity for table in tables])
  clips = {}
  for emotion in map(str, np.unique(emotions[emotions != UNKNOWN])):
    own = emotions == emotion
    clips[emotion] = own
    if by_intensity and emotion != NEUTRAL:
      levels = np.unique(intensity[own])
      for level in levels[levels > 0]:
        clips[f'{emotion}_{level}'] = own & (intensity == level)
  if not clips:
    raise DataError(
      'no clip of the data set has an emotion label; priors need labelled clips'
    )
  return clips


def mean_gaussians(
  statistics: Sequence[Feature], tables: Sequence[ClipTable], by_intensity: bool = False
) -> dict[str, Prior]:
  """Averages means and standard deviations over all clips of each emotion, as in the
  paper.

  Args:
    statistics: the feature 'prior' of each data set (`data.feature_extraction`).
    tables: of the same clips.
    by_intensity: adds one for each level, such as 'happy_3', which shows an emotion
      more clearly than its mean; neutral and unlabelled levels have none.

  Returns:
    Emotion to (mean, standard deviation), float32 `[256]`.

  Raises:
    DataError: no clip has a label.
  """
  gaussians = np.concatenate(
    [[prior(clip)[0] for clip in range(len(prior))] for prior in statistics]
  )
  priors = {}
  for name, clips in averaged_clips(tables, by_intensity).items():
    mean, deviation = gaussians[clips].mean(0)
    priors[name] = (mean, deviation)
  return priors

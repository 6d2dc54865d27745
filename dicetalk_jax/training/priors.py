"""Priors of data sets: one mean Gaussian per emotion (paper section 4.1, the emotion prompt)."""

from collections.abc import Sequence

import numpy as np

from data_pipelines.features import Feature
from data_pipelines.record import UNKNOWN
from data_pipelines.source import ClipTable
from dicetalk_jax.bundle import Prior
from dicetalk_jax.errors import DataError

NEUTRAL = 'neutral'  # has no levels


def mean_gaussians(statistics: Sequence[Feature], tables: Sequence[ClipTable], by_intensity: bool = False
                   ) -> dict[str, Prior]:
  """Averages means and standard deviations over the clips of each emotion.

  Args:
    statistics: the feature 'prior' of each data set (`data_pipelines.compute`).
    tables: of the same clips.
    by_intensity: adds one for each level, such as 'happy_3'; neutral and unlabelled levels have none.

  Returns:
    Emotion to (mean, standard deviation), float32 `[256]`; of its strongest clips.

  Raises:
    DataError: no clip has a label.
  """
  gaussians = np.concatenate([[prior(clip)[0] for clip in range(len(prior))] for prior in statistics])
  emotions, intensity = (np.concatenate([getattr(t, name) for t in tables]) for name in ('emotion', 'intensity'))
  priors = {}
  average = lambda clips: tuple(gaussians[clips].mean(0))
  for emotion in map(str, np.unique(emotions[emotions != UNKNOWN])):
    own = emotions == emotion
    levels = np.unique(intensity[own])
    priors[emotion] = average(own & (intensity == levels[-1]))
    if by_intensity and emotion != NEUTRAL:
      priors |= {f'{emotion}_{level}': average(own & (intensity == level)) for level in levels[levels > 0]}
  if not priors:
    raise DataError('no clip of the data set has an emotion label; priors need labelled clips')
  return priors

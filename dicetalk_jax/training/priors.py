"""Priors of a data set: one mean Gaussian per emotion (paper section 4.1, the emotion prompt)."""

import numpy as np

from data_pipelines.features import Feature
from data_pipelines.record import UNKNOWN
from data_pipelines.source import ClipTable
from dicetalk_jax.bundle import Prior
from dicetalk_jax.errors import DataError

NEUTRAL = 'neutral'  # has no levels


def mean_gaussians(statistics: Feature, table: ClipTable, by_intensity: bool = False) -> dict[str, Prior]:
  """Averages means and standard deviations over the clips of each emotion.

  Args:
    statistics: mean and standard deviation of each clip, from `frozen.statistics`.
    table: of the same clips.
    by_intensity: adds one for each level, such as 'happy_3'; neutral and unlabelled levels have none.

  Returns:
    Emotion to (mean, standard deviation), float32 `[256]`; of its strongest clips.

  Raises:
    DataError: no clip has a label.
  """
  priors = {}
  average = lambda clips: tuple(np.mean([statistics(int(clip))[0] for clip in np.flatnonzero(clips)], axis=0))
  for emotion in map(str, np.unique(table.emotion[table.emotion != UNKNOWN])):
    own = table.emotion == emotion
    levels = np.unique(table.intensity[own])
    priors[emotion] = average(own & (table.intensity == levels[-1]))
    if by_intensity and emotion != NEUTRAL:
      priors |= {f'{emotion}_{level}': average(own & (table.intensity == level)) for level in levels[levels > 0]}
  if not priors:
    raise DataError('no clip of the data set has an emotion label; priors need labelled clips')
  return priors

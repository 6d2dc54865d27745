"""How far a set of generated faces is from true ones: a Fréchet distance in what the
judges see, with the distance that chance alone gives.

An analogue of FID for the synthetic data set; the two are not comparable.
"""

import dataclasses
from typing import NamedTuple, Self

import numpy as np

from dicetalk_jax.errors import InputError
from dicetalk_jax.metrics.frechet import frechet_distance

COMPONENTS = 48


class FaceDistance(NamedTuple):
  """A distance, with the number of frames of the smaller set: few are far apart."""

  distance: float
  frames: int


@dataclasses.dataclass(frozen=True)
class FaceSpace:
  """Principal components of the features of true faces; get it with `FaceSpace.fit`.

  Attributes:
    mean: [D].
    axes: [D,K].
    variance: of all K components together.
  """

  mean: np.ndarray
  axes: np.ndarray
  variance: float

  @classmethod
  def fit(cls, truth: np.ndarray, components: int = COMPONENTS) -> Self:
    """Fits to `Reading.features` of true clips, [N,D].

    Raises:
      InputError: there are not more frames than components.
    """
    truth = np.asarray(truth, np.float64)
    if len(truth) <= components:
      raise InputError(
        f'{len(truth)} frames are too few for {components} components; read more clips'
      )
    mean = truth.mean(0)
    _, lengths, axes = np.linalg.svd(truth - mean, full_matrices=False)
    variance = float((lengths[:components] ** 2).sum() / (len(truth) - 1))
    return cls(mean, axes[:components].T, variance)

  def distance(self, truth: np.ndarray, generated: np.ndarray) -> FaceDistance:
    """Fréchet distance of two sets of features, [N,D] and [M,D], in total variances."""
    distance = frechet_distance(self._reduce(truth), self._reduce(generated))
    distance = max(distance, 0.0) / self.variance  # rounding may give less than nothing
    return FaceDistance(distance, min(len(truth), len(generated)))

  def floor(self, truth: np.ndarray, clips: np.ndarray, seed: int = 0) -> FaceDistance:
    """What chance alone gives: the distance of two halves of the truth.

    Args:
      truth: [N,D] features.
      clips: [N] number of the clip of each frame. The halves share no clip, as the
        frames of one are alike.
      seed: of the division.
    """
    numbers = np.random.default_rng(seed).permutation(np.unique(clips))
    chosen = np.isin(clips, numbers[: len(numbers) // 2])
    return self.distance(truth[chosen], truth[~chosen])

  def _reduce(self, features: np.ndarray) -> np.ndarray:
    return (features - self.mean) @ self.axes

"""One channel from the several channels of a recording."""

from collections.abc import Mapping

import numpy as np

# Loudness of the mean, relative to the least that it has without cancellation: where
# all channels but one are silent.
_CANCELLED = 0.3


class Mixdown:
  """Averages channels, and notices where they cancel each other out.

  A cable or recorder that swaps the poles of one channel turns its sign around. The
  mean of such channels is silent, though each of them is not.
  """

  def __init__(self, chosen: Mapping[int, int] | None = None):
    """Makes a mixdown for one recording.

    Args:
      chosen: the channel that is taken in place of the mean, by number of channels.
        Recordings may change that number.
    """
    self.chosen = chosen or {}
    self._energies: dict[int, np.ndarray] = {}  # of the mean and of each channel

  def __call__(self, samples: np.ndarray) -> np.ndarray:
    """Mixes the next samples, `[n,channels]`, to `[n]`."""
    channels = samples.shape[1]
    if channels in self.chosen:
      return samples[:, self.chosen[channels]]
    mean = samples.mean(axis=1)
    if channels > 1:
      both = np.column_stack([mean, samples])
      energies = np.square(both).sum(axis=0, dtype=np.float64)
      self._energies[channels] = self._energies.get(channels, 0) + energies
    return mean

  def cancelled(self) -> dict[int, int]:
    """The loudest channel, by number of channels, where the mean lost the sound."""
    loudest = {}
    for channels, (mean, *energies) in self._energies.items():
      channel = int(np.argmax(energies))
      least = np.sqrt(energies[channel]) / channels
      if np.sqrt(mean) < _CANCELLED * least:
        loudest[channels] = channel
    return loudest

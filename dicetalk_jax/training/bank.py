"""Initial codes of the emotion bank."""

from collections.abc import Sequence

import numpy as np
from scipy.cluster.vq import kmeans2

from data_pipelines.loader import Part
from dicetalk_jax import parallel
from dicetalk_jax.models.core import Params

DRAWS = 2048


def fit_codes(params: Params, parts: Sequence[Part], seed: int) -> Params:
  """Puts the codes where the priors are: k-means on projected draws.

  From a uniform initial table nearly all priors share one code, or the commitment term shrinks the projection.

  Args:
    params: flat parameters of an emotion model with a bank.
    parts: data sets with the feature 'prior', mean and standard deviation `[1,2,d_s]` of each clip; drawn by weight.
    seed: of the draws and of k-means.

  Returns:
    The same parameters with another `codebook`.
  """
  rng = np.random.default_rng(seed)
  drawn = []
  for part in parts:
    priors, share = part.features['prior'], part.weight / sum(part.weight for part in parts)
    clips = rng.choice(np.flatnonzero(priors.lengths >= 0), round(DRAWS * share))
    drawn += [priors(int(clip))[0] for clip in clips]
  mu, sigma = np.stack(drawn, axis=1).astype(np.float32)
  kernel, bias, codes = parallel.fetch([params[f'codebook.{name}'] for name in (
      'fc.kernel', 'fc.bias', 'codebook.embedding')])
  z = (mu + sigma * rng.standard_normal(mu.shape, np.float32)) @ kernel + bias
  centroids, _ = kmeans2(z, len(codes), minit='++', seed=rng)
  return {**params, 'codebook.codebook.embedding': centroids.astype(codes.dtype)}

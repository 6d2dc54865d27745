"""Fréchet distance between two sets of features: FID with Inception's features, FVD
with I3D's.
"""

import numpy as np


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
  """Squared 2-Wasserstein distance of the Gaussians with the moments of the two sets
  (Heusel et al., 2017).

  |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), in float64. With C = R^T R the trace of the root is the sum of the singular
  values of R1 R2^T: no matrix root is taken, so that none fails where there are fewer
  samples than features.

  Args:
    real, generated: `[N,D]` and `[M,D]`, at least two samples each.

  Raises:
    ValueError: the shapes do not fit, or something is not finite.
  """
  real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
  if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
    raise ValueError(
      f'features {real.shape} and {generated.shape} must be [N,D] and [M,D]'
    )
  if min(len(real), len(generated)) < 2:
    raise ValueError(
      f'{len(real)} and {len(generated)} samples are too few for a covariance'
    )
  if not (np.isfinite(real).all() and np.isfinite(generated).all()):
    raise ValueError('some features are not finite')
  means = [x.mean(axis=0) for x in (real, generated)]
  roots = [
    np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode='r')
    for x, mean in zip((real, generated), means)
  ]
  overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
  return float(
    np.square(means[0] - means[1]).sum()
    + sum(np.square(root).sum() for root in roots)
    - 2 * overlap
  )

"""Fréchet distance of two sets of features: FID with Inception's, FVD with I3D's.

For the evaluation of generated videos, which does not call it yet; training does not.
"""

import numpy as np


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
  """Squared 2-Wasserstein distance of the Gaussians with the moments of the two sets
  (Heusel et al., 2017).

  |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), in float64. With C = R^T R the trace of the
  root is the sum of the singular values of R1 R2^T. So no matrix root is computed,
  which could fail where there are fewer samples than features.

  Args:
    real, generated: `[N,D]` and `[M,D]`, at least two samples each.

  Raises:
    ValueError: the shapes do not fit, or something is not finite.
  """
  real = np.asarray(real, np.float64)
  generated = np.asarray(generated, np.float64)
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
  mean_distance = np.square(real.mean(axis=0) - generated.mean(axis=0)).sum()
  root = _covariance_root(real)
  generated_root = _covariance_root(generated)
  variances = np.square(root).sum() + np.square(generated_root).sum()
  overlap = np.linalg.svd(root @ generated_root.T, compute_uv=False).sum()
  return float(mean_distance + variances - 2 * overlap)


def _covariance_root(x: np.ndarray) -> np.ndarray:
  """R with R^T R the covariance of rows `[N,D]`."""
  centred = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
  return np.asarray(np.linalg.qr(centred, mode='r'))

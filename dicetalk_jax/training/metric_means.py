"""Averages of what steps, micro-batches and evaluation batches log."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SIGMA_EDGES = (0.3, 1.0, 3.0, 10.0)


def aggregate(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Means over rows with the same names, `loss` first, the others by name.

  A value is a scalar, or a pair `[sum, weight]` of something that not every row has as
  much of: its mean is the sum of sums over the sum of weights. Nothing is said of a
  pair without any weight.
  """
  means = {}
  for name in sorted(rows[0], key=lambda name: (name != 'loss', name)):
    columns = zip(*(np.ravel(row[name]).tolist() for row in rows), strict=True)
    total, weight = (*map(math.fsum, columns), len(rows))[:2]
    if weight:
      means[name] = total / weight
  return means


def split_by_sigma(
  name: str, values: jax.Array, sigma: jax.Array, counted: jax.Array | bool = True
) -> dict[str, jax.Array]:
  """Pairs for `mean`, one per range of noise levels: `denoise/sigma_1_3` and so on.

  Args:
    name: of the loss.
    values: `[B]`, the loss of each clip.
    sigma: `[B]`, noise level of each clip.
    counted: bool `[B]`, clips that have this loss.
  """
  which = jnp.searchsorted(jnp.array(SIGMA_EDGES), sigma, side='right')
  pairs = {}
  for i, (low, high) in enumerate(
    zip((0, *SIGMA_EDGES), (*SIGMA_EDGES, math.inf), strict=True)
  ):
    inside = (which == i) & counted
    pairs[f'{name}/sigma_{low:g}_{high:g}'] = jnp.stack(
      [jnp.where(inside, values, 0).mean(), inside.mean()]
    )
  return pairs

"""Means of the metrics of steps, micro-batches and evaluation batches."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SIGMA_EDGES = (0.3, 1.0, 3.0, 10.0)


def aggregate(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Averages rows with the same names; `loss` comes first, the others by name.

  A value is a scalar or a pair `[sum, weight]`. Pairs, for quantities that only some
  rows have, are averaged as total sum / total weight, and omitted if the total weight
  is 0.
  """
  means = {}
  for name in sorted(rows[0], key=lambda name: (name != 'loss', name)):
    values = np.stack([np.asarray(row[name], np.float64) for row in rows])
    if values.ndim == 1:
      means[name] = math.fsum(values) / len(rows)
      continue
    total = math.fsum(values[:, 0])
    weight = math.fsum(values[:, 1])
    if weight:
      means[name] = total / weight
  return means


def split_by_sigma(
  name: str, values: jax.Array, sigma: jax.Array, counted: jax.Array | bool = True
) -> dict[str, jax.Array]:
  """Splits a loss by noise level into pairs for `aggregate`: `denoise/sigma_1_3` and so
  on.

  Args:
    name: of the loss.
    values: `[B]`, the loss of each clip.
    sigma: `[B]`, noise level of each clip.
    counted: bool `[B]`, clips that have this loss.
  """
  which = jnp.searchsorted(jnp.array(SIGMA_EDGES), sigma, side='right')
  edges = (0, *SIGMA_EDGES, math.inf)
  pairs = {}
  for i, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
    inside = (which == i) & counted
    total = jnp.where(inside, values, 0).mean()
    pairs[f'{name}/sigma_{low:g}_{high:g}'] = jnp.stack([total, inside.mean()])
  return pairs

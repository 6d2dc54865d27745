"""Of boxes that overlap, those with the higher scores stay."""

import numpy as np


def overlaps(corners: np.ndarray, of_smaller: bool = False) -> np.ndarray:
  """Shared area of every two boxes, over their union.

  Args:
    corners: `[n,4]`, x0, y0, x1, y1.
    of_smaller: divide by the area of the smaller box instead.

  Returns:
    `[n,n]`.
  """
  low = np.maximum(corners[:, None, :2], corners[None, :, :2])
  high = np.minimum(corners[:, None, 2:], corners[None, :, 2:])
  shared = np.prod(np.clip(high - low, 0, None), axis=-1)
  areas = np.prod(corners[:, 2:] - corners[:, :2], axis=-1)
  if of_smaller:
    whole = np.minimum(areas[:, None], areas[None, :])
  else:
    whole = areas[:, None] + areas[None, :] - shared
  with np.errstate(invalid='ignore'):  # boxes without area share nothing
    return shared / whole


def greedy(corners: np.ndarray, scores: np.ndarray, limit: float) -> np.ndarray:
  """Suppresses boxes that overlap a better box which stays.

  Returns:
    Positions of the boxes that stay, in falling order of their scores; equal scores
    keep their order.
  """
  order = np.argsort(-scores, kind='stable')
  too_close = overlaps(corners[order]) > limit
  kept: list[int] = []
  for i in range(len(order)):
    if not too_close[i, kept].any():
      kept.append(i)
  return order[kept]


def strict(
  corners: np.ndarray, scores: np.ndarray, limit: float, of_smaller: bool = False
) -> np.ndarray:
  """Suppresses boxes that overlap any better box, whether that one stays or not.

  Args:
    corners, scores, limit: as in `greedy`.
    of_smaller: see `overlaps`.

  Returns:
    As `greedy`.
  """
  order = np.argsort(-scores, kind='stable')
  too_close = overlaps(corners[order], of_smaller) > limit
  return order[~np.triu(too_close, 1).any(axis=0)]

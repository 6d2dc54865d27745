"""Of boxes that overlap, those with the higher scores stay."""

import numpy as np


def overlaps(
  corners: np.ndarray, others: np.ndarray, of_smaller: bool = False
) -> np.ndarray:
  """Shared area of boxes, over their union.

  Args:
    corners: `[n,4]`, x0, y0, x1, y1.
    others: `[m,4]`.
    of_smaller: divide by the area of the smaller box instead.

  Returns:
    `[n,m]`.
  """
  low = np.maximum(corners[:, None, :2], others[None, :, :2])
  high = np.minimum(corners[:, None, 2:], others[None, :, 2:])
  shared = np.prod(np.clip(high - low, 0, None), axis=-1)
  areas = np.prod(corners[:, 2:] - corners[:, :2], axis=-1)[:, None]
  other_areas = np.prod(others[:, 2:] - others[:, :2], axis=-1)
  if of_smaller:
    whole = np.minimum(areas, other_areas)
  else:
    whole = areas + other_areas - shared
  with np.errstate(invalid='ignore'):  # boxes without area share nothing
    return shared / whole


def greedy(corners: np.ndarray, scores: np.ndarray, limit: float) -> np.ndarray:
  """Suppresses boxes that overlap a better box which stays.

  Returns:
    Positions of the boxes that stay, in falling order of their scores; equal scores
    keep their order.
  """
  waiting = np.argsort(-scores, kind='stable')
  kept = []
  while len(waiting):
    best, waiting = waiting[:1], waiting[1:]
    kept.append(best)
    shared = overlaps(corners[best], corners[waiting])[0]
    waiting = waiting[~(shared > limit)]
  return np.concatenate(kept) if kept else waiting


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
  sorted_corners = corners[order]
  too_close = overlaps(sorted_corners, sorted_corners, of_smaller) > limit
  return order[~np.triu(too_close, 1).any(axis=0)]

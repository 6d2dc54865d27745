"""Faces found picture by picture become tracks of one face each; pictures become
shots.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses

import numpy as np

from dicetalk_jax.media.image import Box

_OVERLAP = 0.5  # least intersection over union from one find to the next
GAP = 25  # most frames without a find
_MEDIAN = 13  # frames of the filter over time
_CUT = 0.5  # share of the colours that change from one shot to the next


Detector = Callable[
  [np.ndarray], Box | None
]  # from a picture uint8 [H,W,3] to its largest face


@dataclasses.dataclass(frozen=True)
class Track:
  """One face in consecutive frames: `boxes` `[n,4]` as x0, y0, x1, y1 in pixels,
  from frame `first` on.
  """

  first: int
  boxes: np.ndarray

  @property
  def end(self) -> int:
    return self.first + len(self.boxes)


def detect(
  pictures: Iterable[np.ndarray], detector: Detector, every: int = 1, shots: bool = True
) -> tuple[list[Box | None], list[int]]:
  """Looks for a face in every n-th picture: what `tracks` asks for, without cuts
  where there are no `shots`.
  """
  boxes, cuts = [], []
  new_shot = ShotDetector() if shots else lambda picture: False
  for i, picture in enumerate(pictures):
    if new_shot(picture):
      cuts.append(i)
    boxes.append(detector(picture) if i % every == 0 else None)
  return boxes, cuts


def overlap(a: np.ndarray, b: np.ndarray) -> float:
  """Intersection over union of two boxes x0, y0, x1, y1."""
  sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
  shared = sides.prod()
  return float(shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared))


def tracks(boxes: Sequence[Box | None], cuts: Sequence[int] = ()) -> list[Track]:
  """Joins finds that overlap into tracks, smooths them, and keeps the longest where
  several exist at a time.

  Frames without a find are interpolated, up to 25 of them; before the first and after
  the last find the box stays where it is, equally far.

  Args:
    boxes: (left, top, width, height) of the largest face of every frame, None where
      there is none.
    cuts: first frames of all shots but the first; no track crosses them.

  Returns:
    Tracks that share no frame, in order of time.
  """
  found: list[list[tuple[int, np.ndarray]]] = []
  shot = np.searchsorted(np.asarray(cuts, int), np.arange(len(boxes)), side='right')
  for i, box in enumerate(boxes):
    if box is None:
      continue
    corners = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]], np.float64)
    open_tracks = [
      t for t in found if i - t[-1][0] <= GAP + 1 and shot[i] == shot[t[-1][0]]
    ]
    best = max(open_tracks, key=lambda t: overlap(t[-1][1], corners), default=None)
    if best is not None and overlap(best[-1][1], corners) > _OVERLAP:
      best.append((i, corners))
    else:
      found.append([(i, corners)])
  kept: list[list[tuple[int, np.ndarray]]] = []
  for track in sorted(
    found, key=len, reverse=True
  ):  # stable: of equals the earlier one
    if all(track[-1][0] < other[0][0] or other[-1][0] < track[0][0] for other in kept):
      kept.append(track)
  kept.sort(key=lambda track: track[0][0])
  result, after = [], 0
  for j, track in enumerate(kept):
    first, last = track[0][0], track[-1][0]
    limit = kept[j + 1][0][0] if j + 1 < len(kept) else len(boxes)
    same_shot = np.flatnonzero(shot == shot[first])
    begin = max(first - GAP, after, int(same_shot[0]))
    after = min(last + 1 + GAP, limit, int(same_shot[-1]) + 1)
    result.append(Track(begin, _smooth(track, np.arange(begin, after))))
  return result


def _smooth(track: list[tuple[int, np.ndarray]], frames: np.ndarray) -> np.ndarray:
  from scipy.ndimage import median_filter

  at, corners = np.array([i for i, _ in track]), np.stack([box for _, box in track])
  filled = np.stack([np.interp(frames, at, column) for column in corners.T], axis=1)
  return median_filter(filled, size=(_MEDIAN, 1), mode='nearest')


class ShotDetector:
  """Tells where one shot ends and the next begins, by the colours of consecutive
  pictures.
  """

  def __init__(self):
    self._before: np.ndarray | None = None

  def __call__(self, picture: np.ndarray) -> bool:
    """Whether uint8 `[H,W,3]` begins a new shot, seen after the picture of the call
    before.
    """
    import cv2

    small = cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA)
    histogram = (
      cv2.calcHist([small], [0, 1, 2], None, [8] * 3, [0, 256] * 3).ravel() / 64**2
    )
    before, self._before = self._before, histogram
    return before is not None and float(np.abs(histogram - before).sum()) / 2 > _CUT

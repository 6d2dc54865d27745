"""Faces found frame by frame become tracks of one face each; frames become shots."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from dicetalk_jax.media.image import Box

_OVERLAP = 0.5  # least intersection over union from one find to the next
GAP = 25  # most frames without a find
_MEDIAN = 13  # frames of the filter over time
_CUT = 0.5  # share of the colours that change from one shot to the next

BATCH = 8  # frames that the detector gets at once

# Maps frames, uint8 [H,W,3], to the largest face of each.
Detector = Callable[[Sequence[np.ndarray]], Sequence[Box | None]]


@dataclasses.dataclass(frozen=True)
class Track:
  """One face in consecutive frames.

  Attributes:
    first: number of its first frame.
    boxes: `[n,4]`, corners x0, y0, x1, y1 in pixels.
  """

  first: int
  boxes: np.ndarray

  @property
  def end(self) -> int:
    """The first frame after the track."""
    return self.first + len(self.boxes)


class Detections(NamedTuple):
  """Faces and cuts of a video, the input of `tracks`."""

  boxes: list[Box | None]  # the largest face of each frame
  cuts: list[int]  # first frames of all shots but the first


class _Find(NamedTuple):
  """A face in one frame."""

  frame: int
  corners: np.ndarray  # x0, y0, x1, y1


def detect(
  frames: Iterable[np.ndarray], detector: Detector, every: int = 1, shots: bool = True
) -> Detections:
  """Looks for a face in every n-th frame and for cuts, if `shots`, in all of them.

  No more than a batch of frames is in memory.
  """
  boxes: list[Box | None] = []
  cuts = []
  waiting: dict[int, np.ndarray] = {}
  begins_shot = ShotDetector()

  def search() -> None:
    for i, box in zip(waiting, detector([*waiting.values()])):
      boxes[i] = box
    waiting.clear()

  for i, frame in enumerate(frames):
    if shots and begins_shot(frame):
      cuts.append(i)
    boxes.append(None)
    if i % every == 0:
      waiting[i] = frame
    if len(waiting) == BATCH:
      search()
  if waiting:
    search()
  return Detections(boxes, cuts)


def one_by_one(find: Callable[[np.ndarray], Box | None]) -> Detector:
  """Makes a detector of a function that takes one frame at a time."""
  return lambda frames: [find(frame) for frame in frames]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
  """Intersection over union of two boxes x0, y0, x1, y1."""
  sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
  shared = sides.prod()
  return float(shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared))


def tracks(boxes: Sequence[Box | None], cuts: Sequence[int] = ()) -> list[Track]:
  """Joins finds that overlap into tracks, smooths them, and keeps the longest of
  several at the same time.

  Frames without a find are interpolated, up to 25 of them. Before the first and after
  the last find the box stays where it is, for up to 25 frames too.

  Args:
    boxes: the largest face of every frame, None where there is none.
    cuts: first frames of all shots but the first; no track crosses them.

  Returns:
    Tracks that share no frame, in order of time.
  """
  shot = np.searchsorted(np.asarray(cuts, int), np.arange(len(boxes)), side='right')
  kept = _longest(_joined(boxes, shot))
  result: list[Track] = []
  for j, finds in enumerate(kept):
    first, last = finds[0].frame, finds[-1].frame
    same_shot = np.flatnonzero(shot == shot[first])
    earliest = result[-1].end if result else 0
    latest = kept[j + 1][0].frame if j + 1 < len(kept) else len(boxes)
    begin = max(first - GAP, earliest, int(same_shot[0]))
    end = min(last + 1 + GAP, latest, int(same_shot[-1]) + 1)
    result.append(Track(begin, _smooth(finds, np.arange(begin, end))))
  return result


def _joined(boxes: Sequence[Box | None], shot: np.ndarray) -> list[list[_Find]]:
  """Each find continues the track of its shot that it overlaps most, or begins one."""
  found: list[list[_Find]] = []
  for i, box in enumerate(boxes):
    if box is None:
      continue
    left, top, width, height = box
    corners = np.array([left, top, left + width, top + height], np.float64)
    best, best_overlap = None, _OVERLAP
    for track in found:
      last = track[-1]
      if i - last.frame <= GAP + 1 and shot[i] == shot[last.frame]:
        shared = overlap(last.corners, corners)
        if shared > best_overlap:
          best, best_overlap = track, shared
    if best is None:
      best = []
      found.append(best)
    best.append(_Find(i, corners))
  return found


def _longest(found: list[list[_Find]]) -> list[list[_Find]]:
  """Of tracks at the same time the longest, or of equally long ones the earlier."""
  kept: list[list[_Find]] = []
  for track in sorted(found, key=len, reverse=True):  # stable
    if all(
      track[-1].frame < other[0].frame or other[-1].frame < track[0].frame
      for other in kept
    ):
      kept.append(track)
  return sorted(kept, key=lambda track: track[0].frame)


def _smooth(finds: list[_Find], frames: np.ndarray) -> np.ndarray:
  """The boxes at `frames`: interpolated, and filtered over time."""
  from scipy.ndimage import median_filter

  found_at = np.array([find.frame for find in finds])
  columns = np.stack([find.corners for find in finds]).T
  filled = np.stack([np.interp(frames, found_at, x) for x in columns], axis=1)
  return median_filter(filled, size=(_MEDIAN, 1), mode='nearest')


class ShotDetector:
  """Finds where shots begin, by the colours of consecutive frames."""

  def __init__(self) -> None:
    self._before: np.ndarray | None = None

  def __call__(self, frame: np.ndarray) -> bool:
    """Whether uint8 `[H,W,3]` begins a new shot, compared with the frame of the last
    call.
    """
    import cv2

    small = cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA)
    counts = cv2.calcHist([small], [0, 1, 2], None, [8] * 3, [0, 256] * 3)
    histogram = counts.ravel() / 64**2
    before, self._before = self._before, histogram
    return before is not None and float(np.abs(histogram - before).sum()) / 2 > _CUT

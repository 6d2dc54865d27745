"""What a training example is: which frames, which sound, which face region, how much
motion.

Pure functions of arrays and a random generator; the loaders put them together.
"""

from collections.abc import Sequence
import math

import numpy as np

FALLBACK_BUCKETS = (8.0, 16.0)  # the two motion buckets of the published inference
MAX_BUCKET = 127.0


def window_span(frames: int, step: int) -> int:
  """Number of source frames under a window of `frames` at `step`."""
  return step * (frames - 1) + 1


def window_rows(
  rng: np.random.Generator, length: int, frames: int, step: int = 1
) -> np.ndarray:
  """A window at a random place of a clip of `length` frames; int `[frames]`,
  ascending by `step`.
  """
  return rng.integers(length - window_span(frames, step) + 1) + step * np.arange(frames)


def reference_row(
  rng: np.random.Generator, length: int, rows: np.ndarray, stride: int = 1
) -> int:
  """A random frame outside the window if the clip allows it, else any.

  Args:
    length: frames of the clip.
    rows: frames of the window, ascending.
    stride: only every `stride`-th frame has a CLIP token.
  """
  candidates = np.arange(0, length, stride)
  outside = candidates[(candidates < rows[0]) | (candidates > rows[-1])]
  return int(rng.choice(outside if len(outside) else candidates))


def visual_rows(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """What an embedder sees of a clip, `[n,*shape]`.

  A clip without any has no width of its own: it gets the embedder's.

  Args:
    rows: as stored; no rows at all, of whatever shape, where a clip has no expressions
      or pixels.
    shape: of one frame, `EmbedderConfig.visual_shape`.
  """
  return rows if len(rows) else np.zeros((0, *shape), rows.dtype)


def face_mask(boxes: np.ndarray, size: int, area: float) -> np.ndarray:
  """One rectangle that holds the face in every frame.

  Args:
    boxes: `[n, 4]` x1, y1, x2, y2 in [0, 1]; none at all marks the whole picture.
    size: side of the square picture in pixels.
    area: the union of the boxes is scaled by this about its centre.

  Returns:
    float32 `[size, size]`, 1 in the rectangle, 0 elsewhere.
  """
  if not len(boxes):
    return np.ones((size, size), np.float32)
  low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
  centre, half = (low + high) / 2, (high - low) / 2 * area
  x1, y1 = np.clip(np.floor((centre - half) * size), 0, size).astype(int)
  x2, y2 = np.clip(np.ceil((centre + half) * size), 0, size).astype(int)
  mask = np.zeros((size, size), np.float32)
  mask[y1:y2, x1:x2] = 1
  return mask


def motion_bucket(value: float, median: float, fallback: float) -> float:
  """16 is the motion of the median clip, 127 the most; `fallback` for data that does
  not measure it.
  """
  return float(np.clip(16 * value / median, 0, MAX_BUCKET)) if median > 0 else fallback


def draw_group(
  rng: np.random.Generator, clips: Sequence[int], count: int
) -> list[tuple[int, tuple[int, int], float]]:
  """`count` windows of one group: clip, which of how many parts of it the window starts
  in, and where there, in [0, 1).

  All clips are used before one is used again; then the windows of one clip start in
  different parts of it.
  """
  rounds = math.ceil(count / len(clips))
  order = rng.permutation(np.asarray(clips))
  return [
    (int(order[k % len(order)]), (k // len(order), rounds), rng.random())
    for k in range(count)
  ]


def group_window(
  have: int, length: int, min_len: int, part: tuple[int, int], place: float
) -> tuple[int, int]:
  """First frame and number of frames of a window that `draw_group` has drawn.

  A clip that is used again gives windows of at most half of it, so that they start at
  different frames: positives that are one and the same window teach nothing. Clips of
  hardly more than `min_len` frames leave no choice.

  Args:
    have: frames of the clip.
    length: frames asked for, at least `min_len`; shorter clips are used whole.
    min_len: fewest frames.
    part, place: see `draw_group`.
  """
  number, parts = part
  length = min(length, have if parts == 1 else max(min_len, have // 2), have)
  starts = have - length + 1
  first, end = (k * starts // parts for k in (number, number + 1))
  return first + int(place * (end - first)), length

"""The parts of a training example: its frames, face region and amount of motion.

Pure functions of arrays and a random generator; the loaders put them together.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

# Head and expression, as the reference implementation always sets them.
FALLBACK_BUCKETS = (8.0, 16.0)
MAX_BUCKET = 127.0


def window_span(frames: int, step: int) -> int:
  """Number of source frames under a window of `frames` at `step`."""
  return step * (frames - 1) + 1


def window_rows(
  rng: np.random.Generator, length: int, frames: int, step: int = 1
) -> np.ndarray:
  """A window at a random place of a clip of `length` frames.

  Returns:
    int `[frames]`, ascending by `step`.
  """
  start = rng.integers(length - window_span(frames, step) + 1)
  return start + step * np.arange(frames)


def reference_row(
  rng: np.random.Generator, length: int, rows: np.ndarray, stride: int = 1
) -> int:
  """A random frame, outside the window if the clip is long enough.

  Args:
    rng: draws it.
    length: frames of the clip.
    rows: frames of the window, ascending.
    stride: only every `stride`-th frame has a CLIP token.
  """
  candidates = np.arange(0, length, stride)
  outside = candidates[(candidates < rows[0]) | (candidates > rows[-1])]
  return int(rng.choice(outside if len(outside) else candidates))


def visual_rows(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """The visual input of an embedder for one clip, `[n,*shape]`.

  Args:
    rows: as stored. Where a clip has no expressions or pixels there are none, and their
      shape means nothing.
    shape: of one frame, `EmbedderConfig.visual_shape`.
  """
  return rows if len(rows) else np.zeros((0, *shape), rows.dtype)


def face_mask(boxes: np.ndarray, size: int, area: float) -> np.ndarray:
  """One rectangle that holds the face in every frame.

  Args:
    boxes: `[n, 4]` x1, y1, x2, y2 in [0, 1]; without any, the whole image is marked.
    size: side of the square image in pixels.
    area: the union of the boxes is scaled by this about its centre.

  Returns:
    float32 `[size, size]`, 1 in the rectangle, 0 elsewhere.
  """
  if not len(boxes):
    return np.ones((size, size), np.float32)
  low = boxes[:, :2].min(axis=0)
  high = boxes[:, 2:].max(axis=0)
  centre = (low + high) / 2
  half = (high - low) / 2 * area
  x1, y1 = np.clip(np.floor((centre - half) * size), 0, size).astype(int)
  x2, y2 = np.clip(np.ceil((centre + half) * size), 0, size).astype(int)
  mask = np.zeros((size, size), np.float32)
  mask[y1:y2, x1:x2] = 1
  return mask


def motion_bucket(value: float, median: float, fallback: float) -> float:
  """The amount of motion as the UNet reads it: 16 for the median clip, 127 at most.

  Args:
    value: of the clip.
    median: of the data set; 0 where motion is not measured.
    fallback: the result in that case.
  """
  if median <= 0:
    return fallback
  return float(np.clip(16 * value / median, 0, MAX_BUCKET))


class Pick(NamedTuple):
  """A window of a clip, before its length is known.

  Attributes:
    clip: index of the clip.
    number: of the part of the clip that it starts in.
    parts: how many equal parts the clip is divided into.
    place: where in that part it starts, in [0, 1).
  """

  clip: int
  number: int
  parts: int
  place: float


def draw_group(
  rng: np.random.Generator, clips: Sequence[int] | np.ndarray, count: int
) -> list[Pick]:
  """Draws `count` windows of one group of clips.

  All clips are used before one is used again; then the windows of one clip start in
  different parts of it.
  """
  rounds = math.ceil(count / len(clips))
  order = rng.permutation(np.asarray(clips))
  picks = []
  for k in range(count):
    used, position = divmod(k, len(order))
    picks.append(Pick(int(order[position]), used, rounds, rng.random()))
  return picks


def group_window(have: int, length: int, min_len: int, pick: Pick) -> tuple[int, int]:
  """First frame and number of frames of a window that `draw_group` has drawn.

  A clip that is used again gives windows of at most half of it, so that they start at
  different frames: two equal windows would be a positive pair that teaches nothing.
  Clips of hardly more than `min_len` frames leave no choice.

  Args:
    have: frames of the clip.
    length: frames asked for, at least `min_len`; shorter clips are used whole.
    min_len: fewest frames.
    pick: of the clip.
  """
  longest = have if pick.parts == 1 else max(min_len, have // 2)
  length = min(length, longest, have)
  starts = have - length + 1
  first = pick.number * starts // pick.parts
  end = (pick.number + 1) * starts // pick.parts
  return first + int(pick.place * (end - first)), length

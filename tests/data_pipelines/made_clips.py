"""Small videos with a red square for a face, and the detector that finds it."""

import os
import pathlib
import time

import numpy as np

from dicetalk_jax.media import video

SKIN = np.array([210, 40, 30], np.uint8)
RED = 'tests.data_pipelines.made_clips:red'  # the detector, for --detector
FLAGS = ['--size=32', '--min_seconds=.4', f'--detector={RED}', '--workers=1']


def pictures(
  count: int, *, size=(72, 96), face=(30, 20), side=24, step=0.0, light=60
) -> np.ndarray:
  """Makes frames, uint8 `[count,H,W,3]`; the face moves right by `step` pixels."""
  frames = np.full((count, *size, 3), light, np.uint8)
  frames += np.arange(size[1], dtype=np.uint8)[:, None] // 4  # not blank
  for i in range(count):
    left = round(face[0] + step * i)
    frames[i, face[1] : face[1] + side, left : left + side] = SKIN
  return frames


def tone(seconds: float, pitch: float = 220.0) -> np.ndarray:
  """Makes a sine, float32 at 16 kHz."""
  time = np.arange(round(seconds * 16000)) / 16000
  return (0.4 * np.sin(2 * np.pi * pitch * time)).astype(np.float32)


def write(
  path: pathlib.Path,
  seconds: float = 1.0,
  *,
  fps: float = 25.0,
  sound: bool = True,
  **look,
) -> pathlib.Path:
  """Writes a video file."""
  frames = pictures(round(seconds * fps), **look)
  video.write_video(path, frames, fps, tone(seconds) if sound else None)
  return path


def touch(root: pathlib.Path, *paths: str):
  """Makes empty files."""
  for path in paths:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).touch()


def red():
  """Makes a detector that finds the bounds of what is red."""

  def find(image):
    rows, columns = np.nonzero((image[..., 0] > 150) & (image[..., 1] < 110))
    if not len(rows):
      return None
    left, top = int(columns.min()), int(rows.min())
    return left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top

  return find


def deadly():
  """Makes a detector like `red`, which dies of a face at the left.

  It ends its process without a word, as a crashing decoder would.
  """
  find = red()

  def find_or_die(image):
    box = find(image)
    if box and box[0] < 4:
      time.sleep(0.3)  # others are being read meanwhile
      os._exit(1)
    return box

  return find_or_die

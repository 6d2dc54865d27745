"""Square crops of the face in each frame, for embedders that read pixels.

Decoding all frames of a batch again would take far longer than a training step, so the
crops of a data set are stored (`feature_extraction.py`) as the feature `crops_<S>`, S
being their side in pixels.
"""

from collections.abc import Mapping
import os
import re
from typing import Any

import numpy as np
from PIL import Image

from dicetalk_jax.data import clip_record
from dicetalk_jax.detect.mtcnn import largest_faces
from dicetalk_jax.errors import InputError
from dicetalk_jax.media import face_tracking, video_reader
from dicetalk_jax.models.embedder import EmbedderConfig

# Side of the crop in longer sides of the face box. The box ends at brows and chin or a
# little beyond; they stay inside the crop while the smoothed box lags behind a nod or
# an opening mouth.
ENLARGE = 1.2


def feature(size: int) -> str:
  """Name of the stored crops of that side."""
  return f'crops_{size}'


def parse_name(name: str) -> int | None:
  """The inverse of `feature`; None for all other names."""
  found = re.fullmatch(r'crops_([1-9]\d*)', name)
  return int(found[1]) if found else None


def input_name(embedder: EmbedderConfig) -> str:
  """Name of an embedder's visual input among features and blocks of records.

  Such as 'expression' or 'crops_64'.
  """
  return feature(embedder.crop_size) if embedder.visual == 'crops' else embedder.visual


def crop_square(frame: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
  """Cuts out the square around a face.

  Args:
    frame: uint8 `[H,W,3]`.
    corners: x0, y0, x1, y1 of the face in pixels.
    size: S.

  Returns:
    uint8 `[S,S,3]`; a square that does not fit into the frame is moved or, if it must
    be, made smaller.
  """
  width_height = np.array(frame.shape[1::-1], float)
  low, high = np.reshape(corners, (2, 2)).astype(float)
  side = np.clip(ENLARGE * (high - low).max(), 1, width_height.min())
  start = np.clip((low + high) / 2 - side / 2, 0, width_height - side)
  end = np.minimum(start + side, width_height)
  crop = Image.fromarray(frame).resize(
    (size, size), Image.Resampling.LANCZOS, (*start, *end)
  )
  return np.asarray(crop)


def of_record(record: Mapping[str, Any], size: int) -> np.ndarray:
  """Crops of all frames of a clip.

  Returns:
    uint8 `[N,S,S,3]`; no rows where the clip has no pixels or no boxes.
  """
  count = min(len(record.get('frames', ())), len(record['bbox']))
  crops = np.zeros((count, size, size, 3), np.uint8)
  for i in range(count):
    (frame,) = clip_record.decode_frames(record, [i])
    width_height = frame.shape[1::-1]
    crops[i] = crop_square(frame, record['bbox'][i] * np.tile(width_height, 2), size)
  return crops


def of_video(path: str | os.PathLike, size: int) -> tuple[np.ndarray, int]:
  """Crops of the face that a video at 25 frames per second shows longest.

  The video is read twice, so that it is never in memory as a whole.

  Returns:
    uint8 `[N,S,S,3]`, and the first of the N frames that show the face.

  Raises:
    InputError: the video cannot be read, or shows no face.
  """
  frames = video_reader.frames(path, clip_record.FPS)
  boxes, cuts = face_tracking.detect(frames, largest_faces)
  tracks = face_tracking.tracks(boxes, cuts)
  if not tracks:
    raise InputError(
      f'no face was found in {path}; give a video of one person with the face in view'
    )
  longest = max(tracks, key=lambda track: len(track.boxes))
  start = longest.first / clip_record.FPS
  frames = video_reader.frames(path, clip_record.FPS, start, len(longest.boxes))
  crops = [
    crop_square(frame, corners, size) for frame, corners in zip(frames, longest.boxes)
  ]
  return np.stack(crops), longest.first

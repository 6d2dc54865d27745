"""Square crops of the face, frame by frame: what an embedder reads of people without
3DMM fits.

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
from dicetalk_jax.errors import InputError
from dicetalk_jax.media import face, face_tracking, video_reader
from dicetalk_jax.models.embedder import EmbedderConfig

# Side of the crop in longer sides of the face box, which ends at brows and chin or a
# little beyond: they stay inside while the smoothed box lags behind a nod or an opening
# mouth.
ENLARGE = 1.2


def feature(size: int) -> str:
  """Name of the stored crops of that side."""
  return f'crops_{size}'


def parse_name(name: str) -> int | None:
  """The inverse of `feature`; None for all other names."""
  found = re.fullmatch(r'crops_([1-9]\d*)', name)
  return int(found[1]) if found else None


def input_name(embedder: EmbedderConfig) -> str:
  """What an embedder sees, by its name among features and blocks of records:
  'expression' or 'crops_64'.
  """
  return feature(embedder.crop_size) if embedder.visual == 'crops' else embedder.visual


def crop_square(picture: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
  """The square about a face.

  Args:
    picture: uint8 `[H,W,3]`.
    box: x0, y0, x1, y1 of the face in pixels.
    size: S.

  Returns:
    uint8 `[S,S,3]`; a square that does not fit into the picture is moved or, if need
    be, made smaller.
  """
  limit = np.array(picture.shape[1::-1], float)
  corners = np.reshape(box, (2, 2)).astype(float)
  length = np.clip(ENLARGE * (corners[1] - corners[0]).max(), 1, limit.min())
  start = np.clip(corners.mean(axis=0) - length / 2, 0, limit - length)
  return np.asarray(
    Image.fromarray(picture).resize(
      (size, size),
      Image.Resampling.LANCZOS,
      (*start, *np.minimum(start + length, limit)),
    )
  )


def of_record(record: Mapping[str, Any], size: int) -> np.ndarray:
  """Crops of all frames of a clip, uint8 `[N,S,S,3]`; none where it has no pixels or
  no boxes.
  """
  crops = np.zeros(
    (min(len(record.get('frames', ())), len(record['bbox'])), size, size, 3), np.uint8
  )
  for i in range(len(crops)):
    (picture,) = clip_record.decode_frames(record, [i])
    crops[i] = crop_square(
      picture, record['bbox'][i] * np.tile(picture.shape[1::-1], 2), size
    )
  return crops


def of_video(path: str | os.PathLike, size: int) -> tuple[np.ndarray, int]:
  """Crops of the face that a video at 25 frames per second shows longest.

  The video is read twice, so that its pictures need no room.

  Returns:
    uint8 `[N,S,S,3]`, and the first of the N frames that the face was followed through.

  Raises:
    InputError: the video cannot be read, or shows no face.
  """
  tracks = face_tracking.tracks(
    *face_tracking.detect(
      video_reader.frames(path, clip_record.FPS), face.haar_detector()
    )
  )
  if not tracks:
    raise InputError(
      f'no face was found in {path}; give a video of one person seen from the front'
    )
  track = max(tracks, key=lambda track: len(track.boxes))
  pictures = video_reader.frames(
    path, clip_record.FPS, track.first / clip_record.FPS, len(track.boxes)
  )
  return np.stack(
    [crop_square(picture, box, size) for picture, box in zip(pictures, track.boxes)]
  ), track.first

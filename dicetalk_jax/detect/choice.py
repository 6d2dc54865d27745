"""Which detector, and which of several faces."""

from collections.abc import Sequence

import numpy as np

from dicetalk_jax.bundle import ModelFolder
from dicetalk_jax.detect import mtcnn, yolo_face
from dicetalk_jax.detect.faces import Face, FaceDetector, area, centre
from dicetalk_jax.errors import InputError
from dicetalk_jax.media.image import Box

PUBLISHED = 'published'
# A number counts the faces from left to right, from 1 on; `PUBLISHED` stands for the
# choice of the reference implementation, and None for the largest face.
FaceIndex = int | str | None


def detector_of(model: ModelFolder) -> FaceDetector:
  """The detector of a model folder, or MTCNN where it has none.

  Raises:
    WeightsError: the one of the folder is damaged.
  """
  entry = model.components.get(yolo_face.COMPONENT)
  if entry is None:
    return mtcnn.shared()
  return yolo_face.cached(entry.get('fingerprint', ''), str(model))


def find_face(
  image: np.ndarray, detector: FaceDetector | None = None, index: FaceIndex = None
) -> Box:
  """Finds one face in an image.

  Args:
    image: uint8 RGB [H,W,3].
    detector: how to find it; MTCNN by default.
    index: which of several faces.

  Returns:
    left, top, width, height in pixels: for MTCNN the outline of the face without hair,
    for YOLOv5m-face the box of the reference implementation. It may leave the image.

  Raises:
    InputError: no face was found, or fewer than `index`.
  """
  (faces,) = (detector or mtcnn.shared()).find_faces([image])
  if not faces:
    raise InputError(
      'no face was found in the image; use a portrait with the whole face in view, or '
      'say where it is with --face_box=x0,y0,x1,y1'
    )
  return choose(faces, index).box


def choose(faces: Sequence[Face], index: FaceIndex = None) -> Face:
  """Chooses one of at least one face.

  Args:
    faces: in falling order of their scores.
    index: see `FaceIndex`.

  Raises:
    InputError: there are fewer faces.
  """
  if index is None:
    return max(faces, key=area)
  if isinstance(index, str):
    return yolo_face.published_choice(faces)
  if not 1 <= index <= len(faces):
    count = 'one face was' if len(faces) == 1 else f'{len(faces)} faces were'
    raise InputError(
      f'--face_index={index}, but {count} found in the image; count them from left to '
      'right, from 1 on, or say where the face is with --face_box=x0,y0,x1,y1'
    )
  return sorted(faces, key=centre)[index - 1]


def parse_face_index(text: str | None) -> FaceIndex:
  """Reads `--face_index`, None if it was not given.

  Raises:
    InputError: it is neither a number nor 'published'.
  """
  if text is None or text == PUBLISHED:
    return text
  try:
    return int(text)
  except ValueError:
    raise InputError(
      f'--face_index={text} is not understood; give a number, counted from left to '
      f'right from 1 on, or {PUBLISHED}'
    ) from None

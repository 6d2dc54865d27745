"""Where the face is: detectors that need no downloads, or the user's own box."""

from collections.abc import Callable
import math
import os
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dicetalk_jax.errors import InputError
from dicetalk_jax.media.image import Box

# Images are scaled to this longer side first, so that detection always costs the same.
_SEARCH_SIDE = 640
_SMALLEST = 1 / 12  # of the longer side; a portrait has no smaller face


class _Square(NamedTuple):
  """A find, in pixels of the searched image."""

  left: int
  top: int
  side: int


class _Outline(NamedTuple):
  """The outline of a face without hair, in sides of a detector's square."""

  shift_x: float  # of its centre from that of the square
  shift_y: float
  width: float
  height: float


# Boxes of the training data follow the outline. Medians over 60 rendered identities
# (256 px, half of them neutral, half with an emotion), whose outline is known; the
# spread is .02 in position and .05 in size.
_HAAR_OUTLINE = _Outline(0.0, 0.02, 0.91, 1.14)
_LBP_OUTLINE = _Outline(0.0, 0.04, 0.91, 1.13)


def find_face(image: np.ndarray) -> Box:
  """Finds the largest face of an image.

  Args:
    image: uint8 RGB [H,W,3].

  Returns:
    (left, top, width, height) in pixels, within the image: the outline of the face
    without hair.

  Raises:
    InputError: no face was found.
  """
  grey = _searched(image)
  box = _largest(image, _haar(grey), _HAAR_OUTLINE)
  if box is None:
    box = _largest(image, _lbp(grey), _LBP_OUTLINE)
  if box is None:
    raise InputError(
      'no face was found in the image; use a frontal portrait or say where the face is '
      'with --face_box=x0,y0,x1,y1'
    )
  return box


def haar_detector() -> Callable[[np.ndarray], Box | None]:
  """The detector for many images in a row: `find_face` by OpenCV alone.

  Returns:
    A function that gives None for an image without a face.

  Raises:
    InputError: OpenCV or its cascade is missing.
  """
  cascade = _cascade()
  if cascade is None:
    raise InputError(
      'faces in videos are found by OpenCV, which is missing; pip install '
      'opencv-python-headless'
    )
  return lambda image: _largest(image, _haar(_searched(image), cascade), _HAAR_OUTLINE)


def _search_scale(image: np.ndarray) -> float:
  return _SEARCH_SIDE / max(image.shape[:2])


def _searched(image: np.ndarray) -> np.ndarray:
  """The image in grey at the size that is searched: uint8 [h,w]."""
  height, width = image.shape[:2]
  scale = _search_scale(image)
  size = max(1, round(width * scale)), max(1, round(height * scale))
  grey = Image.fromarray(image).convert('L')
  return np.asarray(grey.resize(size, Image.Resampling.BILINEAR))


def _largest(
  image: np.ndarray, squares: list[_Square], outline: _Outline
) -> Box | None:
  """The outline of the largest find, in pixels of the image and within it."""
  if not squares:
    return None
  left, top, side = max(squares, key=lambda square: square.side)
  x = left + side / 2 + outline.shift_x * side
  y = top + side / 2 + outline.shift_y * side
  half_width = outline.width * side / 2
  half_height = outline.height * side / 2
  corners = np.array([x - half_width, y - half_height, x + half_width, y + half_height])
  height, width = image.shape[:2]
  limits = [width, height, width, height]
  x0, y0, x1, y1 = np.clip(corners / _search_scale(image), 0, limits).tolist()
  return x0, y0, x1 - x0, y1 - y0


def parse_face_box(text: str, image_size: tuple[int, int]) -> Box:
  """Reads `--face_box`.

  Args:
    text: 'x0,y0,x1,y1', corners in pixels.
    image_size: (width, height) of the image.

  Returns:
    (left, top, width, height) in pixels.

  Raises:
    InputError: there are not four numbers, or they enclose no area of the image.
  """
  try:
    x0, y0, x1, y1 = (float(number) for number in text.split(','))
  except ValueError as error:
    raise InputError(
      f'--face_box={text} is not understood; give four numbers x0,y0,x1,y1'
    ) from error
  width, height = image_size
  if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and math.isfinite(x0 + y0)):
    raise InputError(
      f'--face_box={text} is not a box within the image; give x0,y0,x1,y1 with '
      f'0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}'
    )
  return x0, y0, x1 - x0, y1 - y0


def _cascade() -> Any:
  """OpenCV's frontal Haar cascade, or None where there is none.

  Not shared: it keeps state while it searches.
  """
  try:
    import cv2
    import cv2.data
  except ImportError:
    return None
  if not hasattr(cv2, 'CascadeClassifier'):  # OpenCV 5 moved it out of the main package
    return None
  return cv2.CascadeClassifier(
    os.path.join(cv2.data.haarcascades, 'haarcascade_frontalface_alt2.xml')
  )


def _haar(grey: np.ndarray, cascade: Any = None) -> list[_Square]:
  """The finds of OpenCV's Haar cascade in uint8 [H,W]."""
  cascade = cascade or _cascade()
  if cascade is None:
    return []
  smallest = int(max(grey.shape) * _SMALLEST)
  found = cascade.detectMultiScale(
    grey, scaleFactor=1.1, minNeighbors=4, minSize=(smallest, smallest)
  )
  return [_Square(int(left), int(top), int(side)) for left, top, side, _ in found]


def _lbp(grey: np.ndarray) -> list[_Square]:
  """The finds of scikit-image's LBP cascade, for places without OpenCV."""
  try:
    from skimage import data, feature
  except ImportError:
    return []
  cascade = feature.Cascade(data.lbp_frontal_face_cascade_filename())
  smallest = int(max(grey.shape) * _SMALLEST)
  largest = min(grey.shape)
  found = cascade.detect_multi_scale(
    img=np.stack([grey] * 3, -1),
    scale_factor=1.1,
    step_ratio=1,
    min_size=(smallest, smallest),
    max_size=(largest, largest),
  )
  return [_Square(box['c'], box['r'], box['width']) for box in found]

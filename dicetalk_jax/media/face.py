"""Where the face is: detectors that need no downloads, or the user's own box."""

from collections.abc import Callable
import math
import os

import numpy as np
from PIL import Image

from dicetalk_jax.errors import InputError
from dicetalk_jax.media.image import Box

# pictures are scaled to this longer side first: detection costs the same for every
# picture
_SEARCH_SIDE = 640
_SMALLEST = 1 / 12  # of the longer side; smaller finds are no portraits

# From a detector's square to the outline of the face without hair, which the training
# boxes follow: shift of the centre (x, y) and size (x, y), in sides of the square.
# Medians over 60 rendered persons (256 px, half of them neutral, half with an emotion),
# whose outline is known; the spread is .02 in position and .05 in size.
_HAAR_TO_FACE = (0.0, 0.02, 0.91, 1.14)
_LBP_TO_FACE = (0.0, 0.04, 0.91, 1.13)


def find_face(image: np.ndarray) -> Box:
  """The largest face of a picture.

  Args:
    image: uint8 RGB [H,W,3].

  Returns:
    (left, top, width, height) in pixels, within the picture: the outline of the face
    without hair.

  Raises:
    InputError: no face was found.
  """
  box = _largest(image, ((_haar, _HAAR_TO_FACE), (_lbp, _LBP_TO_FACE)))
  if box is None:
    raise InputError(
      'no face was found in the picture; use a frontal portrait or say where the face '
      'is with --face_box=x0,y0,x1,y1'
    )
  return box


def haar_detector() -> Callable[[np.ndarray], Box | None]:
  """The detector for many pictures in a row: `find_face` by OpenCV alone, None where
  there is no face.

  Raises:
    InputError: OpenCV or its cascade is missing.
  """
  cascade = _cascade()
  if cascade is None:
    raise InputError(
      'faces in videos are found by OpenCV, which is missing; pip install '
      'opencv-python-headless'
    )
  return lambda image: _largest(
    image, ((lambda grey: _haar(grey, cascade), _HAAR_TO_FACE),)
  )


def _largest(image: np.ndarray, detectors) -> Box | None:
  """The largest find of the first detector that has one; each comes with its way
  from square to face.
  """
  height, width = image.shape[:2]
  scale = _SEARCH_SIDE / max(height, width)
  size = max(1, round(width * scale)), max(1, round(height * scale))
  grey = np.asarray(
    Image.fromarray(image).convert('L').resize(size, Image.Resampling.BILINEAR)
  )
  for detect, (shift_x, shift_y, size_x, size_y) in detectors:
    if squares := detect(grey):
      left, top, side = max(squares, key=lambda square: square[2])
      x, y = left + side / 2 + shift_x * side, top + side / 2 + shift_y * side
      corners = np.array(
        [
          x - size_x * side / 2,
          y - size_y * side / 2,
          x + size_x * side / 2,
          y + size_y * side / 2,
        ]
      )
      x0, y0, x1, y1 = np.clip(
        corners / scale, 0, [width, height, width, height]
      ).tolist()
      return x0, y0, x1 - x0, y1 - y0
  return None


def parse_face_box(text: str, image_size: tuple[int, int]) -> Box:
  """Reads `--face_box`.

  Args:
    text: 'x0,y0,x1,y1', corners in pixels.
    image_size: (width, height) of the picture.

  Returns:
    (left, top, width, height) in pixels.

  Raises:
    InputError: not four numbers, no area, or not within the picture.
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
      f'--face_box={text} is no box within the picture; give x0,y0,x1,y1 with '
      f'0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}'
    )
  return x0, y0, x1 - x0, y1 - y0


def _cascade():
  """OpenCV's frontal Haar cascade, or None where there is none.

  Not shared: it keeps state while it searches.
  """
  try:
    import cv2
  except ImportError:
    return None
  if not hasattr(cv2, 'CascadeClassifier'):  # OpenCV 5 moved it out of the main package
    return None
  return cv2.CascadeClassifier(
    os.path.join(cv2.data.haarcascades, 'haarcascade_frontalface_alt2.xml')
  )


def _haar(grey: np.ndarray, cascade=None) -> list[tuple[int, int, int]]:
  """OpenCV's Haar cascade: squares (left, top, side) in pixels of `grey` uint8
  [H,W].
  """
  cascade = cascade or _cascade()
  if cascade is None:
    return []
  smallest = int(max(grey.shape) * _SMALLEST)
  found = cascade.detectMultiScale(
    grey, scaleFactor=1.1, minNeighbors=4, minSize=(smallest, smallest)
  )
  return [(int(left), int(top), int(side)) for left, top, side, _ in found]


def _lbp(grey: np.ndarray) -> list[tuple[int, int, int]]:
  """scikit-image's LBP cascade, for places without OpenCV."""
  try:
    from skimage import data, feature
  except ImportError:
    return []
  cascade = feature.Cascade(data.lbp_frontal_face_cascade_filename())
  smallest, largest = int(max(grey.shape) * _SMALLEST), min(grey.shape)
  found = cascade.detect_multi_scale(
    img=np.stack([grey] * 3, -1),
    scale_factor=1.1,
    step_ratio=1,
    min_size=(smallest, smallest),
    max_size=(largest, largest),
  )
  return [(box['c'], box['r'], box['width']) for box in found]

"""Boxes of faces that the user gives; `dicetalk_jax/detect` finds the others."""

import math

from dicetalk_jax.errors import InputError
from dicetalk_jax.media.image import Box


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

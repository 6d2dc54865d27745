"""From a detector's box to the outline of a face: the box that data sets hold."""

import numpy as np

from dicetalk_jax.detect.faces import Face

# Fitted to 797 rendered faces of 24 to 230 pixels, whose outline (hairline to chin,
# without hair and ears) is known: turned and tilted by up to 34 degrees, raised or
# lowered by up to 20. docs/detection.md has the errors, and what else was tried.
WIDTH = 1.15
HEIGHT = 1.075
TILT = 0.18  # a tilted face fills a larger upright box
RISE = 0.022  # of the middle, towards the hairline, in sides of the box


def outlined(face: Face) -> Face:
  """Replaces MTCNN's box by the outline of the face."""
  left, top, width, height = face.box

  # 1. Which way the face looks down: from the eyes to the mouth
  down = face.landmarks[3:].mean(axis=0) - face.landmarks[:2].mean(axis=0)
  down = down / max(float(np.linalg.norm(down)), 1e-6)
  growth = 1 + TILT * abs(float(down[0]))

  # 2. Move and enlarge the box
  rise = RISE * np.sqrt(width * height)
  x = left + width / 2 - rise * down[0]
  y = top + height / 2 - rise * down[1]
  width *= WIDTH * growth
  height *= HEIGHT * growth
  box = float(x - width / 2), float(y - height / 2), float(width), float(height)
  return face._replace(box=box)

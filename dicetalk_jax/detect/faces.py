"""Faces, and the interface of all detectors."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dicetalk_jax.media.image import Box


class Face(NamedTuple):
  """One face in an image.

  Attributes:
    box: left, top, width, height in pixels; it may leave the image.
    landmarks: `[5,2]`, x and y in pixels: left eye, right eye, nose, left and right
      corner of the mouth, as seen in the image.
    score: how sure the detector is, in [0,1].
  """

  box: Box
  landmarks: np.ndarray
  score: float


class FaceDetector(Protocol):
  """Finds faces. Programs are compiled once for a handful of image sizes."""

  def find_faces(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
    """Finds all faces of several images.

    Args:
      images: uint8 RGB `[H,W,3]`; a batch is fastest if all have the same size.

    Returns:
      The faces of each image, in falling order of their scores.
    """
    ...


def area(face: Face) -> float:
  """Square pixels of the box."""
  _, _, width, height = face.box
  return width * height


def centre(face: Face) -> tuple[float, float]:
  """x and y of the middle of the box."""
  left, top, width, height = face.box
  return left + width / 2, top + height / 2

"""The detector of the reference implementation, YOLOv5m-face, and what it does to
images: the same image gives the same box.
"""

from collections.abc import Sequence
import functools

import cv2
import numpy as np

from dicetalk_jax.bundle import Folder
from dicetalk_jax.component import Component
from dicetalk_jax.detect import suppression
from dicetalk_jax.detect.faces import Face, area
from dicetalk_jax.models import yolo_face

COMPONENT = 'face_detector'  # in model folders
SHORT_SIDE = 416  # of the image that the network sees
# Long sides of the arrays that images are put into, each with a compiled program.
# Longer ones get a program of their own.
LONG_SIDES = (416, 576, 768, 1152)
BATCH = 4  # images that are computed at once, if there are as many

_SURE = 0.5  # least objectness, and least confidence
_OVERLAP = 0.45  # most of two faces


class YoloFaceDetector:
  """Finds faces as the reference implementation does."""

  def __init__(self, network: Component[yolo_face.YoloFaceConfig]):
    self._rows = network.stage(yolo_face.forward)

  @classmethod
  def load(cls, folder: Folder) -> 'YoloFaceDetector':
    """Restores the component of a model folder.

    Raises:
      WeightsError: the folder has none, or a damaged one.
    """
    return cls(Component.load(folder, COMPONENT))

  def find_faces(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
    """See `FaceDetector`."""
    found: list[list[Face]] = [[] for _ in images]
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, image in enumerate(images):
      size = array_size(*network_size(*image.shape[:2]))
      by_size.setdefault(size, []).append(i)
    for size, members in by_size.items():
      count = 1 if len(members) == 1 else BATCH
      for start in range(0, len(members), count):
        batch = members[start : start + count]
        pixels = np.zeros((count, *size, 3), np.float32)
        sizes = np.full((count, 2), size)
        for row, i in enumerate(batch):
          image = network_input(images[i])
          sizes[row] = image.shape[:2]
          pixels[row, : sizes[row, 0], : sizes[row, 1]] = image
        rows = np.asarray(self._rows(pixels, sizes))
        for row, i in enumerate(batch):
          chosen = confident(rows[row])
          found[i] = faces_of(chosen, images[i].shape[:2], tuple(sizes[row]))
    return found


def network_size(height: int, width: int) -> tuple[int, int]:
  """Height and width of the image that the network sees: multiples of 32."""
  scale = SHORT_SIDE / min(height, width)
  multiple = yolo_face.MULTIPLE

  def rounded(side: int) -> int:
    return int(side * scale + multiple - 1) // multiple * multiple

  return rounded(height), rounded(width)


def array_size(height: int, width: int) -> tuple[int, int]:
  """Height and width of the array that such an image is put into."""

  def fitting(side: int) -> int:
    return next((longest for longest in LONG_SIDES if side <= longest), side)

  return fitting(height), fitting(width)


def network_input(image: np.ndarray) -> np.ndarray:
  """Scales an image uint8 [H,W,3] to its network size, whatever that does to its
  aspect.

  OpenCV's bilinear filter rounds to 8 bits in a way of its own.

  Returns:
    float32 `[h,w,3]` in [0,1].
  """
  height, width = network_size(*image.shape[:2])
  resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
  return resized.astype(np.float32) / np.float32(255)


def confident(rows: np.ndarray) -> np.ndarray:
  """Chooses among the rows of one image.

  Args:
    rows: float32 `[N,16]`, see `YoloFace.decode`.

  Returns:
    float32 `[n,16]`, in falling order of confidence: corners x0, y0, x1, y1, the
    confidence, landmarks, and the class, 0.
  """
  rows = rows[rows[:, 4] > _SURE]
  confidence = rows[:, 4] * rows[:, 15]
  rows = rows[confidence > _SURE]
  confidence = confidence[confidence > _SURE]
  half = rows[:, 2:4] / 2
  corners = np.concatenate([rows[:, :2] - half, rows[:, :2] + half], axis=1)
  stay = suppression.greedy(corners, confidence, _OVERLAP)
  found = rows[stay]
  found[:, :4] = corners[stay]
  found[:, 4] = confidence[stay]
  found[:, 15] = 0
  return found


def faces_of(
  rows: np.ndarray, image_size: tuple[int, int], seen_size: tuple[int, ...]
) -> list[Face]:
  """Makes faces, in pixels of the image, of what `confident` has chosen.

  Args:
    rows: the result of `confident`.
    image_size: height and width of the image.
    seen_size: those of what the network saw.
  """
  scale = np.array(image_size[::-1], np.float64) / seen_size[::-1]
  faces = []
  for row in rows.astype(np.float64):
    x0, y0 = (row[:2] * scale).tolist()
    x1, y1 = (row[2:4] * scale).tolist()
    landmarks = row[5:15].reshape(5, 2) * scale
    faces.append(Face((x0, y0, x1 - x0, y1 - y0), landmarks, float(row[4])))
  return faces


def published_choice(faces: Sequence[Face]) -> Face:
  """The face that the reference implementation takes of several.

  It means to take the largest, but compares every face with the first: it takes the
  last that is larger than the most confident one.
  """
  first = faces[0]
  larger = [face for face in faces if area(face) > area(first)]
  return larger[-1] if larger else first


@functools.lru_cache(maxsize=1)
def cached(fingerprint: str, folder: str) -> YoloFaceDetector:
  """The detector of the last model folder, so that nothing is read or compiled twice.

  Args:
    fingerprint: of the component, in case the folder changes.
    folder: path or address of the model folder.
  """
  del fingerprint
  return YoloFaceDetector.load(folder)

"""The default detector, MTCNN, with the weights that come with this package.

The arithmetic is that of the package `mtcnn` 1.0.0, odd pixels included: an image that
already has one of our sizes gives the same faces.
"""

from collections.abc import Sequence
import functools
import pathlib
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from dicetalk_jax.detect import suppression
from dicetalk_jax.detect.faces import Face, area
from dicetalk_jax.detect.outline import outlined
from dicetalk_jax.media.image import Box
from dicetalk_jax.models import mtcnn, parameters

WEIGHTS = pathlib.Path(__file__).with_suffix('.safetensors')

# Images are searched at these sizes, height and width: scaled down to fit into one of
# them, and padded with black. Each has a compiled program of its own.
SIZES = (
  (128, 128),
  (256, 256),
  (384, 384),
  (384, 640),
  (640, 384),
  (512, 512),
  (512, 640),
  (640, 512),
  (640, 640),
)
SMALLEST = 20  # pixels of the searched image: the side of the smallest face
BATCH = 8  # images that are searched at once, if there are as many

_CELL = 12  # pixels that the first network sees at once
_STRIDE = 2  # pixels from one box to the next
_SHRINK = 0.709  # from one level of the pyramid to the next
_CANDIDATES = 2000  # best boxes of a level that are kept: bounds time and memory
# Boxes that a network looks at in one call.
_CHUNKS = {24: 64, 48: 16}

# Least scores of the three networks.
_PROPOSED = 0.6
_REFINED = 0.7
_FOUND = 0.8
# Largest overlaps: within a level, and everywhere else.
_OF_LEVEL = 0.5
_OVERLAP = 0.7


class MTCNNDetector:
  """Finds faces of any size from a 30th of the picture upwards, tilted by up to about
  45 degrees, and from the front to nearly the side.
  """

  def __init__(self) -> None:
    self._graphdef, _ = parameters.abstract(mtcnn.MTCNN)
    self._params = {name: jnp.asarray(x) for name, x in load_file(WEIGHTS).items()}
    self._propose = jax.jit(self._run_first)
    self._look = jax.jit(self._run_later, static_argnums=3)

  def find_faces(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
    """See `FaceDetector`; boxes are outlines of faces without hair."""
    return [[outlined(face) for face in faces] for faces in self.find_raw(images)]

  def find_raw(self, images: Sequence[np.ndarray]) -> list[list[Face]]:
    """The same with the boxes of the network."""
    found: list[list[Face]] = [[] for _ in images]
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, image in enumerate(images):
      by_size.setdefault(search_size(*image.shape[:2]), []).append(i)
    for size, members in by_size.items():
      # One image alone, or full batches: two programs per size.
      count = 1 if len(members) == 1 else BATCH
      for start in range(0, len(members), count):
        batch = members[start : start + count]
        canvases = np.zeros((count, *size, 3), np.uint8)
        scales = np.ones(count)
        for row, i in enumerate(batch):
          scales[row] = _place(images[i], canvases[row])
        faces = self._search(canvases, len(batch))
        for row, i in enumerate(batch):
          found[i] = [_scaled(face, 1 / scales[row]) for face in faces[row]]
    return found

  def _search(self, canvases: np.ndarray, count: int) -> list[list[Face]]:
    """Finds the faces of the first `count` canvases, in their pixels."""
    pixels = jnp.asarray(canvases)
    owners, corners = self._proposals(canvases, count)

    # 1. Refine the proposals.
    look = self._look_at(pixels, owners, corners, 24)
    corners = corners + look.offsets * _sides(corners)
    sure = look.score > _REFINED
    owners, corners, scores = owners[sure], corners[sure], look.score[sure]
    stay = _suppressed(owners, corners, scores)
    owners, corners = owners[stay], _squares(corners[stay])

    # 2. Look once more, and find the landmarks. Those belong to the square.
    look = self._look_at(pixels, owners, corners, 48)
    x = look.landmarks[:, :5] * _sides(corners)[:, :1] + corners[:, :1] - 1
    y = look.landmarks[:, 5:] * _sides(corners)[:, 1:2] + corners[:, 1:2] - 1
    landmarks = np.stack([x, y], axis=-1)
    corners = corners + look.offsets * _sides(corners)
    sure = look.score > _FOUND
    owners, corners, scores = owners[sure], corners[sure], look.score[sure]
    landmarks = landmarks[sure]
    stay = _suppressed(owners, corners, scores, of_smaller=True)

    # 3. Sort them by image.
    faces: list[list[Face]] = [[] for _ in range(count)]
    for i in stay:
      x0, y0, x1, y1 = corners[i].tolist()
      box = x0, y0, x1 - x0, y1 - y0
      faces[owners[i]].append(Face(box, landmarks[i], float(scores[i])))
    return faces

  def _proposals(
    self, canvases: np.ndarray, count: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Squares that may hold a face: the image of each, and its corners `[n,4]`."""
    pyramid = _pyramid(*canvases.shape[1:3])
    pixels = np.zeros((len(canvases), *pyramid.valid.shape, 3), np.float32)
    for image in range(count):
      pyramid.fill(canvases[image], pixels[image])
    look = self._propose(self._params, pixels, pyramid.valid)
    scores, offsets = np.asarray(look.score), np.asarray(look.offsets)
    owners = []
    squares = []
    for image in range(count):
      boxes, of_boxes = _thinned(pyramid, scores[image], offsets[image])
      stay = suppression.strict(boxes, of_boxes, _OVERLAP)
      squares.append(_squares(boxes[stay]))
      owners.append(np.full(len(stay), image))
    return np.concatenate(owners), np.concatenate(squares)

  def _look_at(
    self, pixels: jax.Array, owners: np.ndarray, corners: np.ndarray, side: int
  ) -> mtcnn.Look:
    """Lets the network for crops of that side look at boxes."""
    looks = []
    chunk = _CHUNKS[side]
    for start in range(0, len(owners), chunk):
      owner = owners[start : start + chunk]
      corner = corners[start : start + chunk].astype(np.float32)
      padding = chunk - len(owner)
      boxes = np.pad(corner, ((0, padding), (0, 0))), np.pad(owner, (0, padding))
      look = self._look(self._params, pixels, boxes, side)
      looks.append(jax.tree.map(functools.partial(_first, len(owner)), look))
    if not looks:
      return mtcnn.Look(np.zeros(0), np.zeros((0, 4)), np.zeros((0, 10)))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *looks)

  def _run_first(
    self, params: parameters.Params, pixels: jax.Array, valid: jax.Array
  ) -> mtcnn.Look:
    """What the first network says about pyramids."""
    networks = parameters.merge(self._graphdef, params)
    with jax.default_matmul_precision('highest'):
      look: mtcnn.Look = networks.pnet(pixels, valid)
      return look

  def _run_later(
    self,
    params: parameters.Params,
    pixels: jax.Array,
    boxes: tuple[jax.Array, jax.Array],
    side: int,
  ) -> mtcnn.Look:
    """What the second or third network says, by the side of its crops."""
    networks = parameters.merge(self._graphdef, params)
    network = networks.rnet if side == 24 else networks.onet
    with jax.default_matmul_precision('highest'):
      look: mtcnn.Look = network(
        _crops(_normalised(pixels.astype(jnp.float32)), *boxes, side)
      )
      return look


@functools.cache
def shared() -> MTCNNDetector:
  """The detector of this process, so that nothing is read or compiled twice."""
  return MTCNNDetector()


def largest_faces(images: Sequence[np.ndarray]) -> list[Box | None]:
  """Finds the outline of the largest face of each image.

  Args:
    images: uint8 RGB [H,W,3].

  Returns:
    left, top, width, height in pixels, or None for an image without a face.
  """
  found = shared().find_faces(images)
  return [max(faces, key=area).box if faces else None for faces in found]


def search_size(height: int, width: int) -> tuple[int, int]:
  """The size that an image is searched at: the smallest that it fits into as it is, or
  that scales it down least.
  """

  def loss(size: tuple[int, int]) -> tuple[float, int]:
    return -min(1, size[0] / height, size[1] / width), size[0] * size[1]

  return min(SIZES, key=loss)


def _place(image: np.ndarray, canvas: np.ndarray) -> float:
  """Puts an image into the upper left corner of a canvas, and returns its scale."""
  height, width = image.shape[:2]
  scale = min(1, canvas.shape[0] / height, canvas.shape[1] / width)
  if scale < 1:
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
  canvas[: image.shape[0], : image.shape[1]] = image
  return scale


def _scaled(face: Face, factor: float) -> Face:
  left, top, width, height = (factor * number for number in face.box)
  return Face((left, top, width, height), factor * face.landmarks, face.score)


class _Level(NamedTuple):
  """An image at one scale, as a part of a pyramid."""

  scale: float
  top: int
  left: int
  height: int
  width: int

  def cells(self) -> tuple[slice, slice]:
    """Where the first network says something about this level."""
    return tuple(  # type: ignore[return-value]
      slice(start // _STRIDE, start // _STRIDE - (2 - side) // _STRIDE - 4)
      for start, side in ((self.top, self.height), (self.left, self.width))
    )

  def boxes(self) -> np.ndarray:
    """What the cells see, in pixels of the image: corners `[h,w,4]`."""
    rows, columns = self.cells()
    count = rows.stop - rows.start, columns.stop - columns.start
    y, x = np.indices(count) * _STRIDE + 1
    last = _CELL - 1
    return np.stack([x, y, x + last, y + last], axis=-1) / self.scale


class _Pyramid:
  """All scales of an image side by side in one picture, so that one call sees all.

  Attributes:
    levels: from the largest to the smallest.
    valid: bool `[H,W]`, where the first convolution of the network sees pixels of one
      level only.
  """

  def __init__(self, height: int, width: int):
    self.levels: list[_Level] = []
    self.shelves: list[list[int]] = []  # top, height, and how much of the width is used
    scale = _CELL / SMALLEST
    whole = int(width * scale)
    while min(height, width) * scale >= _CELL:
      self._add(scale, int(height * scale), int(width * scale), whole)
      scale *= _SHRINK
    top, tallest, _ = self.shelves[-1]
    self.valid = np.zeros((_even(top + tallest), _even(whole)), bool)
    for level in self.levels:
      bottom, right = level.top + level.height - 2, level.left + level.width - 2
      self.valid[level.top : bottom, level.left : right] = True

  def _add(self, scale: float, height: int, width: int, whole: int) -> None:
    """Puts a level on the first shelf where there is room for it, or on a new one."""
    for shelf in self.shelves:
      top, tallest, used = shelf
      if height <= tallest and used + width <= whole:
        break
    else:
      top = 0
      if self.shelves:
        top = _even(self.shelves[-1][0] + self.shelves[-1][1])
      used = 0
      shelf = [top, height, used]
      self.shelves.append(shelf)
    shelf[2] = _even(used + width)
    self.levels.append(_Level(scale, top, used, height, width))

  def fill(self, image: np.ndarray, pixels: np.ndarray) -> None:
    """Draws all levels of a uint8 image into float32 `[H,W,3]`.

    Every new pixel is the mean over its area.
    """
    normalised = _normalised(image.astype(np.float32))
    for level in self.levels:
      rows = slice(level.top, level.top + level.height)
      columns = slice(level.left, level.left + level.width)
      pixels[rows, columns] = cv2.resize(
        normalised, (level.width, level.height), interpolation=cv2.INTER_AREA
      )


@functools.cache
def _pyramid(height: int, width: int) -> _Pyramid:
  return _Pyramid(height, width)


def _even(number: int) -> int:
  return number + number % 2


def _thinned(
  pyramid: _Pyramid, scores: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Likely boxes of an image, without those that overlap within a level.

  Args:
    pyramid: of the image.
    scores, offsets: what the first network says, `[h,w]` and `[h,w,4]`.

  Returns:
    Corners `[n,4]` in pixels of the image, and scores.
  """
  corners = []
  kept_scores = []
  for level in pyramid.levels:
    score = scores[level.cells()].ravel()
    best = np.flatnonzero(score > _PROPOSED)
    best = best[np.argsort(-score[best], kind='stable')[:_CANDIDATES]]
    cells = level.boxes().reshape(-1, 4)[best]
    offset = offsets[level.cells()].reshape(-1, 4)[best]
    boxes = cells + offset * _box_sides(cells)
    stay = suppression.strict(boxes, score[best], _OF_LEVEL)
    corners.append(boxes[stay])
    kept_scores.append(score[best][stay])
  return np.concatenate(corners), np.concatenate(kept_scores)


def _normalised(pixels: Any) -> Any:
  """0 to 255 becomes -1 to 1, nearly."""
  return (pixels - np.float32(127.5)) / np.float32(128)


def _crops(
  image: jax.Array, corners: jax.Array, owners: jax.Array, side: int
) -> jax.Array:
  """Cuts boxes out of images, bilinearly, with zeros outside.

  As in TensorFlow's `crop_and_resize`, corners are fractions of the image, which the
  centres of its first and last pixels span.

  Returns:
    `[n,side,side,3]`.
  """
  height, width = image.shape[1:3]

  def positions(low: jax.Array, high: jax.Array, length: int) -> jax.Array:
    step = jnp.arange(side, dtype=jnp.float32) / (side - 1)
    return (low[:, None] + (high - low)[:, None] * step) * ((length - 1) / length)

  x = positions(corners[:, 0], corners[:, 2], width)[:, None, :, None]
  y = positions(corners[:, 1], corners[:, 3], height)[:, :, None, None]
  inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
  left, top = jnp.floor(x), jnp.floor(y)

  def pixel(row: jax.Array, column: jax.Array) -> jax.Array:
    row = jnp.clip(row, 0, height - 1).astype(jnp.int32)[..., 0]
    column = jnp.clip(column, 0, width - 1).astype(jnp.int32)[..., 0]
    return image[owners[:, None, None], row, column]

  right, down = x - left, y - top
  above = pixel(top, left) * (1 - right) + pixel(top, left + 1) * right
  below = pixel(top + 1, left) * (1 - right) + pixel(top + 1, left + 1) * right
  return jnp.where(inside, above * (1 - down) + below * down, 0)


def _first(count: int, rows: jax.Array) -> np.ndarray:
  return np.asarray(rows)[:count]


def _box_sides(corners: np.ndarray) -> np.ndarray:
  """Width, height, width, height of boxes, `[n,4]`."""
  return np.tile(corners[:, 2:] - corners[:, :2], 2)


def _sides(corners: np.ndarray) -> np.ndarray:
  """The same for the later networks, which count the last pixel too."""
  return _box_sides(corners) + 1


def _squares(corners: np.ndarray) -> np.ndarray:
  """Boxes as high as wide, with the same middle."""
  sides = corners[:, 2:] - corners[:, :2]
  centres = (corners[:, :2] + corners[:, 2:]) / 2
  half = sides.max(axis=1, keepdims=True, initial=0) / 2
  return np.concatenate([centres - half, centres + half], axis=1)


def _suppressed(
  owners: np.ndarray, corners: np.ndarray, scores: np.ndarray, of_smaller: bool = False
) -> np.ndarray:
  """Positions of the boxes that stay, image by image."""
  kept: list[Any] = [np.zeros(0, int)]
  for owner in np.unique(owners):
    own = np.flatnonzero(owners == owner)
    stay = suppression.strict(corners[own], scores[own], _OVERLAP, of_smaller)
    kept.append(own[stay])
  return np.concatenate(kept)

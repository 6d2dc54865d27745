"""A picture file and a face box become what the networks see: pixels, face mask and
CLIP image.

The arithmetic, floors and roundings included, is the published one: the same picture
gives the same pixels.
"""

import dataclasses
import os

import numpy as np
from PIL import Image, ImageOps

from dicetalk_jax.errors import InputError

Box = tuple[float, float, float, float]  # left, top, width, height in pixels

MIN_SIDE = 64
_CLIP_MEAN = np.float32([0.48145466, 0.4578275, 0.40821073])
_CLIP_STD = np.float32([0.26862954, 0.26130258, 0.27577711])


@dataclasses.dataclass(frozen=True)
class Portrait:
  """One portrait, ready for the networks.

  Attributes:
    ref_img: float32 [H,W,3] in [-1,1].
    mask: float32 [H,W] in [0,1], 1 on the face (soft at the edges where the picture was
      resized).
    clip_image: float32 [S,S,3], normalised for CLIP.
  """

  ref_img: np.ndarray
  mask: np.ndarray
  clip_image: np.ndarray


def load_image(path: str | os.PathLike, min_side: int = MIN_SIDE) -> np.ndarray:
  """Reads a picture upright (EXIF orientation) as uint8 RGB [H,W,3].

  Raises:
    InputError: the file is missing, is no picture, is damaged, or a side is shorter
      than `min_side` pixels.
  """
  if not os.path.isfile(path):
    raise InputError(f'image {path} does not exist; check the path')
  try:
    with Image.open(path) as file:
      pixels = np.asarray(ImageOps.exif_transpose(file).convert('RGB'))
  except Image.DecompressionBombError as error:
    raise InputError(
      f'image {path} is too large; scale it down to a few thousand pixels a side'
    ) from error
  except (
    OSError,
    SyntaxError,
    ValueError,
  ) as error:  # Pillow's three ways to say that a file is broken
    raise InputError(
      f'image {path} cannot be read; give a whole JPEG, PNG or WebP file'
    ) from error
  if min(pixels.shape[:2]) < min_side:
    height, width = pixels.shape[:2]
    raise InputError(
      f'image {path} is only {width}x{height} pixels; each side needs at least '
      f'{min_side}'
    )
  return pixels


def prepare_portrait(
  image: np.ndarray,
  face_box: Box,
  *,
  image_size: int = 512,
  area: float = 1.1,
  multiple: int = 64,
  clip_size: int = 224,
) -> Portrait:
  """Published preprocessing of the portrait.

  Args:
    image: uint8 [H0,W0,3].
    face_box: (left, top, width, height) of the face, in pixels of `image`.
    image_size: length of the shorter side after resizing, before rounding.
    area: the mask is the box with its sides grown by this factor.
    multiple: both sides become multiples of this; eight times the deepest downsampling
      of the UNet.
    clip_size: side of the CLIP image.

  Raises:
    InputError: the box lies outside of the picture, or `image_size` is too small.
  """
  height, width = image.shape[:2]
  rows, columns = mask_slices(face_box, width, height, area)
  mask = np.zeros((height, width), np.uint8)
  mask[rows, columns] = 255
  if not mask.any():
    raise InputError(
      f'the face box {tuple(face_box)} covers nothing of the {width}x{height} picture; '
      'give one inside it with --face_box=x0,y0,x1,y1'
    )
  size = target_size(width, height, image_size, multiple)
  picture, mask = _resize(image, size), _resize(mask, size)
  return Portrait(
    ref_img=(picture / np.float32(255) - np.float32(0.5)) / np.float32(0.5),
    mask=mask / np.float32(255),
    clip_image=clip_pixels(picture, clip_size),
  )


def clip_pixels(picture: np.ndarray, size: int = 224) -> np.ndarray:
  """What CLIP sees of a picture uint8 [H,W,3]: float32 [size,size,3], squeezed to a
  square and normalised.
  """
  return (_resize(picture, (size, size)) / np.float32(255) - _CLIP_MEAN) / _CLIP_STD


def target_size(
  width: int, height: int, image_size: int = 512, multiple: int = 64
) -> tuple[int, int]:
  """(width, height) with the shorter side near `image_size`; each rounded to a
  multiple, halves to even.
  """
  scale = image_size / min(width, height)
  size = (
    round(width * scale / multiple) * multiple,
    round(height * scale / multiple) * multiple,
  )
  if not min(size):
    raise InputError(
      f'an image size of {image_size} is too small; use a multiple of {multiple}'
    )
  return size


def mask_slices(
  face_box: Box, width: int, height: int, area: float = 1.1
) -> tuple[slice, slice]:
  """Rows and columns of the face mask in a picture of that size.

  Published floors: all divisions are `//` of floats.
  """
  left, top, box_width, box_height = face_box
  x, y = (left + (left + box_width)) // 2, (top + (top + box_height)) // 2
  half_width, half_height = box_width * area // 2, box_height * area // 2
  left, right = max(x - half_width, 0), min(x + half_width, width)
  top, bottom = max(y - half_height, 0), min(y + half_height, height)
  return slice(int(top), max(int(bottom), 0)), slice(int(left), max(int(right), 0))


def crop_square(
  box: Box, width: int, height: int, expand: float = 0.5
) -> tuple[int, int, int, int]:
  """The published optional crop: a square around a face, as (x0, y0, x1, y1) for
  `image[y0:y1, x0:x1]`.

  The box grows by `expand` times its sides on every side, is clipped to the picture,
  and the largest square in its middle is moved along the longer side towards the centre
  of the face, as far as the grown box allows.

  Args:
    box: (x0, y0, x1, y1) of the face, in pixels. These are corners, as in the published
      routine.
    width: of the picture.
    height: of the picture.
    expand: 0.5 in the published program.
  """
  x0, y0, x1, y1 = box
  grow_x, grow_y = expand * (x1 - x0), expand * (y1 - y0)
  left, right = max(x0 - grow_x, 0), min(x1 + grow_x, width)
  top, bottom = max(y0 - grow_y, 0), min(y1 + grow_y, height)
  side = min(right - left, bottom - top)

  def span(low: float, high: float, wanted_centre: float) -> tuple[int, int]:
    spare = (high - low - side) / 2
    shift = np.clip(wanted_centre - (low + high) / 2, -spare, spare)
    start = low + spare + shift
    return round(start), round(start + side)

  (left, right), (top, bottom) = (
    span(left, right, (x0 + x1) / 2),
    span(top, bottom, (y0 + y1) / 2),
  )
  return left, top, right, bottom


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """8-bit LANCZOS, as published; a picture that has the size stays untouched."""
  if pixels.shape[1::-1] == size:
    return pixels
  return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))

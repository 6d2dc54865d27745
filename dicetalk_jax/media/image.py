"""Image files and face boxes become what the networks read: pixels, mask, CLIP input.

The arithmetic, floors and roundings included, is that of the reference implementation:
the same image gives the same pixels.
"""

import dataclasses
import math
import os
import warnings

import numpy as np
from PIL import Image, ImageOps

from dicetalk_jax.errors import InputError

Box = tuple[float, float, float, float]  # left, top, width, height in pixels
Corners = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

MIN_SIDE = 64
# Larger images are refused, since small files may unpack to gigabytes. Cameras have up
# to 100 million pixels.
MAX_PIXELS = 1 << 27
# Formats that Pillow reads by itself. For others (EPS) it starts another program.
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'TIFF', 'AVIF', 'BMP', 'GIF', 'JPEG2000', 'PPM')
_WHITE = [2**bits - 1 for bits in (8, 10, 12, 14, 16)]  # bit depths of cameras
_SAMPLED = 1_000_000  # pixels at most that percentiles are computed from
_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclasses.dataclass(frozen=True)
class Portrait:
  """One portrait, ready for the networks.

  Attributes:
    ref_img: float32 [H,W,3] in [-1,1].
    mask: float32 [H,W] in [0,1], 1 on the face (soft at the edges where the image was
      resized).
    clip_image: float32 [S,S,3], normalised for CLIP.
  """

  ref_img: np.ndarray
  mask: np.ndarray
  clip_image: np.ndarray


def load_image(path: str | os.PathLike, min_side: int = MIN_SIDE) -> np.ndarray:
  """Reads an image upright (EXIF orientation) as uint8 RGB [H,W,3].

  Transparency is ignored, as the reference implementation does. Grey images of more
  than 8 bits and of floats are scaled to their range, see `_scaled`.

  Raises:
    InputError: the file is missing, damaged or not an image, has more than
      `MAX_PIXELS`, or a side is shorter than `min_side` pixels.
  """
  if not os.path.isfile(path):
    raise InputError(f'image {path} does not exist; check the path')
  try:
    pixels = _read_pixels(path)
  except Image.DecompressionBombError as error:
    raise InputError(
      f'image {path} is too large; scale it down to a few thousand pixels a side'
    ) from error
  # All of these are raised for broken files.
  except (OSError, SyntaxError, ValueError, EOFError, OverflowError) as error:
    raise InputError(
      f'image {path} cannot be read; give a whole JPEG, PNG or WebP file'
    ) from error
  height, width = pixels.shape[:2]
  if min(height, width) < min_side:
    raise InputError(
      f'image {path} is only {width}x{height} pixels; each side needs at least '
      f'{min_side}'
    )
  return pixels


def _read_pixels(path: str | os.PathLike) -> np.ndarray:
  """uint8 RGB [H,W,3]; Pillow raises an error of one of many kinds."""
  Image.init()
  known = [name for name in _FORMATS if name in Image.OPEN]
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # see MAX_PIXELS
    file = Image.open(path, formats=known)
  with file:
    # The size is in the header: nothing has been unpacked yet.
    if file.width * file.height > MAX_PIXELS:
      raise Image.DecompressionBombError(f'{file.width}x{file.height} pixels')
    image = ImageOps.exif_transpose(file)
  if image.mode == 'F' or image.mode.startswith('I'):
    return np.stack([_scaled(np.asarray(image))] * 3, axis=-1)
  if image.mode == 'P':
    image = image.convert('RGBA')  # the way to RGB on which Pillow does not warn
  return np.asarray(image.convert('RGB'))


def _scaled(grey: np.ndarray) -> np.ndarray:
  """Scales grey values to 8 bits.

  White is the largest value of the bit depth that the values need. Floats from 0 to 1
  keep that range. All others, and negative numbers, have no known range; black and
  white are percentiles then, so that a few highlights do not darken all the rest.

  Args:
    grey: integers of 16 or 32 bits, or float32 [H,W]; NaN becomes black.

  Returns:
    uint8 [H,W].

  Raises:
    ValueError: no value is a finite number.
  """
  known = grey[np.isfinite(grey)]
  if not known.size:
    raise ValueError('there are no numbers')
  low, high = float(known.min()), float(known.max())
  if grey.dtype.kind in 'iu' and low >= 0 and high <= _WHITE[-1]:
    low, high = 0, next(white for white in _WHITE if white >= high)
  elif low >= 0 and high <= 1:
    low, high = 0, 1
  else:
    sample = known[:: math.ceil(known.size / _SAMPLED)]
    low, high = np.percentile(sample, (0.1, 99.9))
  scaled = (grey.astype(np.float32) - low) * (255 / max(high - low, 1e-30))
  return np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8)


def prepare_portrait(
  image: np.ndarray,
  face_box: Box,
  *,
  image_size: int = 512,
  area: float = 1.1,
  multiple: int = 64,
  clip_size: int = 224,
) -> Portrait:
  """Preprocesses the portrait as the reference implementation does.

  Args:
    image: uint8 [H0,W0,3].
    face_box: of the face, in pixels of `image`.
    image_size: length of the shorter side after resizing, before rounding.
    area: the mask is the box with its sides scaled by this factor.
    multiple: both sides become multiples of this; eight times the deepest downsampling
      of the UNet.
    clip_size: side of the CLIP image.

  Raises:
    InputError: the box lies outside the image, or `image_size` is too small.
  """
  height, width = image.shape[:2]
  rows, columns = mask_slices(face_box, width, height, area)
  mask = np.zeros((height, width), np.uint8)
  mask[rows, columns] = 255
  if not mask.any():
    raise InputError(
      f'the face box {tuple(face_box)} covers nothing of the {width}x{height} image; '
      'give one inside it with --face_box=x0,y0,x1,y1'
    )
  size = target_size(width, height, image_size, multiple)
  resized = _resize(image, size)
  return Portrait(
    ref_img=(resized / np.float32(255) - np.float32(0.5)) / np.float32(0.5),
    mask=_resize(mask, size) / np.float32(255),
    clip_image=clip_pixels(resized, clip_size),
  )


def clip_pixels(image: np.ndarray, size: int = 224) -> np.ndarray:
  """CLIP's view of an image uint8 [H,W,3]: squeezed to a square and normalised.

  Returns:
    float32 [size,size,3].
  """
  return (_resize(image, (size, size)) / np.float32(255) - _CLIP_MEAN) / _CLIP_STD


def target_size(
  width: int, height: int, image_size: int = 512, multiple: int = 64
) -> tuple[int, int]:
  """(width, height) with the shorter side near `image_size`.

  Each is rounded to a multiple, halves to even.

  Raises:
    InputError: a side would be 0.
  """
  scale = image_size / min(width, height)
  size = (
    round(width * scale / multiple) * multiple,
    round(height * scale / multiple) * multiple,
  )
  if min(size) < 1:
    raise InputError(
      f'an image size of {image_size} is too small; use a multiple of {multiple}'
    )
  return size


def mask_slices(
  face_box: Box, width: int, height: int, area: float = 1.1
) -> tuple[slice, slice]:
  """Rows and columns of the face mask in an image of that size.

  The floors are those of the reference implementation: all divisions are `//` of
  floats.
  """
  left, top, box_width, box_height = face_box
  x = (left + (left + box_width)) // 2
  y = (top + (top + box_height)) // 2
  half_width = box_width * area // 2
  half_height = box_height * area // 2
  x0, x1 = max(x - half_width, 0), min(x + half_width, width)
  y0, y1 = max(y - half_height, 0), min(y + half_height, height)
  return slice(int(y0), max(int(y1), 0)), slice(int(x0), max(int(x1), 0))


def crop_square(
  face: Corners, width: int, height: int, expand: float = 0.5
) -> tuple[int, int, int, int]:
  """The optional crop of the reference implementation: a square around a face.

  The face grows by `expand` times its sides on every side and is clipped to the image.
  The largest square in the middle of that is moved along the longer side towards the
  centre of the face, as far as the grown face allows.

  Args:
    face: its corners.
    width: of the image.
    height: of the image.
    expand: 0.5 in the reference implementation.

  Returns:
    Corners (x0, y0, x1, y1), for `image[y0:y1, x0:x1]`.
  """
  x0, y0, x1, y1 = face
  grow_x = expand * (x1 - x0)
  grow_y = expand * (y1 - y0)
  left, right = max(x0 - grow_x, 0), min(x1 + grow_x, width)
  top, bottom = max(y0 - grow_y, 0), min(y1 + grow_y, height)
  side = min(right - left, bottom - top)
  crop_x0, crop_x1 = _place_span(left, right, side, (x0 + x1) / 2)
  crop_y0, crop_y1 = _place_span(top, bottom, side, (y0 + y1) / 2)
  return crop_x0, crop_y0, crop_x1, crop_y1


def crop_around_face(
  image: np.ndarray, face_box: Box, expand: float = 0.5
) -> tuple[np.ndarray, Box]:
  """Cuts the square of `crop_square` out of an image.

  Args:
    image: uint8 [H0,W0,3].
    face_box: of the face, in pixels of `image`.
    expand: see `crop_square`.

  Returns:
    The square, and the same box in pixels of it.

  Raises:
    InputError: the square is smaller than the smallest image.
  """
  left, top, box_width, box_height = face_box
  corners = (left, top, left + box_width, top + box_height)
  height, width = image.shape[:2]
  x0, y0, x1, y1 = crop_square(corners, width, height, expand)
  square = image[y0:y1, x0:x1]
  if min(square.shape[:2]) < MIN_SIDE:
    raise InputError(
      f'the crop around the face has only {x1 - x0}x{y1 - y0} pixels, each side needs '
      f'at least {MIN_SIDE}; use a larger image, or leave out --crop'
    )
  return square, (left - x0, top - y0, box_width, box_height)


def _place_span(
  low: float, high: float, length: float, centre: float
) -> tuple[int, int]:
  """A span of `length` in [low, high], with its middle as near to `centre` as fits."""
  spare = (high - low - length) / 2
  shift = np.clip(centre - (low + high) / 2, -spare, spare)
  start = low + spare + shift
  return round(start), round(start + length)


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """8-bit LANCZOS; an image that already has that size stays untouched."""
  if pixels.shape[1::-1] == size:
    return pixels
  return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))

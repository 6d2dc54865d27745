"""What the judges look at: gradient histograms and a small image of a face.

The first set of features is of the whole face, for expressions. The second is of the
inner face alone, for identity: hair, clothes and background would give people away
whatever their faces look like.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

CROP = 64  # side of a face crop
# Rows and columns that are read: 48 pixels, from the hairline to below the lower lip.
_CENTRE = slice(12, 60), slice(8, 56)
_MOUTH = slice(22, 46), slice(12, 36)  # of the mouth within the centre
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_COLOUR = 12  # side of the small colour image


def crop_faces(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """Cuts the face out of the frames of one clip.

  One box serves the whole clip: a box that followed the jaw would reveal the opening by
  itself.

  Args:
    frames: uint8 [N,H,W,3].
    boxes: [4] or [N,4], x0, y0, x1, y1 in [0,1] of the frame; the outline of the face.

  Returns:
    uint8 [N,64,64,3].
  """
  height, width = frames.shape[1:3]
  mean_box = np.reshape(boxes, (-1, 4)).mean(0).clip(0, 1)
  box = tuple(mean_box * (width, height, width, height))
  crops = []
  for frame in frames:
    whole = Image.fromarray(frame)
    crop = whole.resize((CROP, CROP), Image.Resampling.BICUBIC, box=box)
    crops.append(np.asarray(crop))
  return np.stack(crops)


def expression_features(crops: np.ndarray) -> np.ndarray:
  """Gradient histograms of face and mouth, and a small standardised grey image.

  Args:
    crops: uint8 [N,64,64,3].

  Returns:
    float32 [N,1476].
  """
  grey = _centre(crops) @ _LUMA
  face = _gradient_histograms(grey, 6)
  mouth = _gradient_histograms(grey[:, *_MOUTH], 4)
  return np.concatenate([face, mouth, _standardised(_shrink(grey, 24))], axis=1)


def identity_features(crops: np.ndarray) -> np.ndarray:
  """Gradient histograms, a small grey and a smaller colour image of the inner face.

  Nothing outside an ellipse around eyes, nose and mouth has any influence.

  Args:
    crops: uint8 [N,64,64,3].

  Returns:
    float32 [N,1584].
  """
  colour = _centre(crops)
  mean = (colour * _INNER).sum((1, 2), keepdims=True) / _INNER.sum()
  colour = mean + _INNER * (colour - mean)
  grey = colour @ _LUMA
  small = _shrink(colour, _COLOUR).reshape(len(crops), -1)
  return np.concatenate(
    [_gradient_histograms(grey, 6), _standardised(_shrink(grey, 24)), small], axis=1
  )


def _inner_face() -> np.ndarray:
  """Weights [48,48,1] of the pixels of an ellipse, with an edge of about 3 pixels."""
  down, right = np.mgrid[:48, :48]
  radius = np.hypot((down - 25.5) / 22, (right - 23.5) / 21)
  return np.clip((1 - radius) * 7, 0, 1).astype(np.float32)[..., None]


_INNER = _inner_face()


def _centre(crops: np.ndarray) -> np.ndarray:
  """The part that is read, in [0,1]: float32 [N,48,48,3]."""
  return crops[:, *_CENTRE].astype(np.float32) / 255


def _shrink(images: np.ndarray, side: int) -> np.ndarray:
  """Means of square blocks: [N,48,48,...] to [N,side,side,...]."""
  block = images.shape[1] // side
  blocks = images.reshape(-1, side, block, side, block, *images.shape[3:])
  return blocks.mean((2, 4))


def _standardised(grey: np.ndarray) -> np.ndarray:
  """Images [N,S,S] without brightness and contrast, [N,S^2], as large as histograms."""
  flat = grey.reshape(len(grey), -1)
  centred = flat - flat.mean(1, keepdims=True)
  return 0.2 * centred / (flat.std(1, keepdims=True) + 0.02)


def _gradient_histograms(grey: np.ndarray, cell: int) -> np.ndarray:
  """HOG with nine unsigned orientations (Dalal and Triggs, 2005).

  Args:
    grey: [N,S,S].
    cell: side of a cell in pixels.

  Returns:
    [N, 9 (S/cell)^2].
  """
  cells = grey.shape[1] // cell
  down, right = np.gradient(grey, axis=(1, 2))
  strength = np.hypot(down, right)
  angle = np.arctan2(down, right) % np.pi * (9 / np.pi)
  histogram = np.empty((len(grey), cells, cells, 9), np.float32)
  for b in range(9):
    distance = np.abs(angle - b)
    share = strength * np.maximum(0, 1 - np.minimum(distance, 9 - distance))
    histogram[..., b] = share.reshape(-1, cells, cell, cells, cell).sum((2, 4))
  energy = ndimage.uniform_filter((histogram**2).sum(-1), (0, 3, 3), mode='nearest')
  normalised = histogram / np.sqrt(energy + (0.02 * cell) ** 2)[..., None]
  return normalised.reshape(len(grey), -1)

"""Reads emotion and mouth opening off rendered faces.

It is a linear map of gradient histograms, in closed form. It measures the synthetic
data set only, where the truth is known. It is quick to fit (no gradient descent), is
made robust to mirroring, blur and noise, and shares no code with the model it judges.
"""

import dataclasses
from typing import Self

import numpy as np
from PIL import Image
from scipy import ndimage

CROP = 64  # side of a face crop
_CENTRE = slice(8, 56)  # the 48 pixels that are read
_MOUTH = slice(22, 46), slice(12, 36)  # rows and columns of the mouth within the centre
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_RIDGES = (0.01, 0.05, 0.2, 1.0, 5.0)  # in mean variances of a feature
_TEMPERATURES = np.geomspace(1, 32, 16)


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


def face_features(crops: np.ndarray) -> np.ndarray:
  """Gradient histograms of face and mouth, and a small standardised grey image.

  Args:
    crops: uint8 [N,64,64,3].

  Returns:
    [N,1476].
  """
  grey = crops[:, _CENTRE, _CENTRE].astype(np.float32) @ _LUMA / 255
  small = grey.reshape(-1, 24, 2, 24, 2).mean((2, 4)).reshape(len(grey), -1)
  small = (small - small.mean(1, keepdims=True)) / (small.std(1, keepdims=True) + 0.02)
  face = _gradient_histograms(grey, 6)
  mouth = _gradient_histograms(grey[:, *_MOUTH], 4)
  return np.concatenate([face, mouth, 0.2 * small], axis=1)


def degrade(
  crops: np.ndarray, seed: int, blur: float = 2.0, noise: float = 10.0
) -> np.ndarray:
  """Blurs each crop and adds noise.

  Args:
    crops: uint8 [N,H,W,3].
    seed: of the noise, and of how strong both are.
    blur: largest standard deviation, in pixels.
    noise: largest standard deviation, in grey levels.
  """
  rng = np.random.default_rng(seed)
  out = np.empty(crops.shape, np.float32)
  for i, (crop, sigma) in enumerate(zip(crops, rng.uniform(0, blur, len(crops)))):
    ndimage.gaussian_filter(crop.astype(np.float32), (sigma, sigma, 0), output=out[i])
  grain = rng.standard_normal(out.shape, np.float32)
  out += grain * rng.uniform(0, noise, (len(out), 1, 1, 1)).astype(np.float32)
  return (out + 0.5).clip(0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class FaceProbe:
  """Ridge regression from features to emotions and mouth opening.

  Make one with `FaceProbe.fit`. With references (a neutral crop of the same identity
  for each crop) it reads the change of the features only.

  Attributes:
    weights: [features, emotions + 1]; the last column is of the opening.
    offsets: [emotions + 1].
    temperature: factor of the scores before the softmax.
  """

  weights: np.ndarray
  offsets: np.ndarray
  temperature: float

  @classmethod
  def fit(
    cls,
    crops: np.ndarray,
    emotions: np.ndarray,
    openings: np.ndarray,
    reference: np.ndarray | None = None,
    *,
    num_emotions: int = 8,
    max_frames: int = 4000,
    seed: int = 0,
  ) -> Self:
    """Fits on clean, mirrored and degraded copies.

    The ridges and the softmax temperature are those that are best on the last quarter
    of the frames. Order the frames by identity, so that these are of new identities.

    Args:
      crops: uint8 [N,64,64,3].
      emotions: [N] indices.
      openings: [N] mouth openings, in any unit.
      reference: uint8 [N,64,64,3], a neutral crop of the same identity for each crop.
      num_emotions: how many emotions there are.
      max_frames: of more frames evenly spaced ones are used.
      seed: of the degradations.
    """
    # 1. Features x and targets y of every copy: [N, copies, ...].
    count = min(len(crops), max_frames)
    keep = np.linspace(0, len(crops) - 1, count).round().astype(int)
    crops = crops[keep]
    copies = [crops, degrade(crops, seed), degrade(crops[:, :, ::-1], seed + 1)]
    x = np.stack([face_features(copy) for copy in copies], axis=1)
    if reference is not None:
      plain = face_features(reference[keep])
      mirrored = face_features(reference[keep, :, ::-1])
      x -= np.stack([plain, plain, mirrored], axis=1)
    one_hot = np.eye(num_emotions)[np.asarray(emotions)[keep]]
    opening = np.asarray(openings, np.float64)[keep, None]
    y = np.concatenate([one_hot, opening], axis=1)
    y = np.repeat(y[:, None], len(copies), axis=1)

    # 2. Choose ridges and temperature on the last quarter.
    known = len(x) * 3 // 4
    new_x, new_y = _rows(x[known:]), _rows(y[known:])
    solutions = _ridge(_rows(x[:known]), _rows(y[:known]), _RIDGES)
    guesses = [new_x @ weights + offsets for weights, offsets in solutions]
    errors = np.array([((guess - new_y) ** 2).mean(0) for guess in guesses])
    best_emotion = int(errors[:, :-1].mean(1).argmin())
    best_opening = int(errors[:, -1].argmin())
    labels = new_y[:, :-1].argmax(1)

    def likelihood(temperature: float) -> float:
      log_probs = _log_softmax(temperature * guesses[best_emotion][:, :-1])
      return log_probs[np.arange(len(labels)), labels].mean()

    temperature = max(_TEMPERATURES, key=likelihood)

    # 3. Fit all frames.
    ridges = (_RIDGES[best_emotion], _RIDGES[best_opening])
    for_emotion, for_opening = _ridge(_rows(x), _rows(y), ridges)
    weights, offsets = for_emotion
    weights[:, -1] = for_opening[0][:, -1]
    offsets[-1] = for_opening[1][-1]
    return cls(weights, offsets, float(temperature))

  def emotion(
    self, crops: np.ndarray, reference: np.ndarray | None = None
  ) -> np.ndarray:
    """Log probabilities of the emotions.

    Args:
      crops: uint8 [N,64,64,3].
      reference: neutral crops, or one for all.

    Returns:
      [N,emotions].
    """
    return _log_softmax(self.temperature * self._read(crops, reference)[:, :-1])

  def opening(
    self, crops: np.ndarray, reference: np.ndarray | None = None
  ) -> np.ndarray:
    """Mouth opening, in the unit of the truth that the probe was fitted to.

    Args:
      crops: uint8 [N,64,64,3].
      reference: neutral crops, or one for all.

    Returns:
      [N].
    """
    return self._read(crops, reference)[:, -1]

  def _read(self, crops: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    x = face_features(crops)
    if reference is not None:
      x = x - face_features(reference)
    return x @ self.weights + self.offsets


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


def _rows(x: np.ndarray) -> np.ndarray:
  """`[..., D]` to `[n, D]`."""
  return x.reshape(-1, x.shape[-1])


def _ridge(
  x: np.ndarray, y: np.ndarray, ridges: tuple[float, ...]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Least squares with an offset.

  Args:
    x: [N,D].
    y: [N,K].
    ridges: weights of the penalty, in mean variances of a feature.

  Returns:
    (weights [D,K], offsets [K]) for each ridge.
  """
  x_mean = x.mean(0)
  y_mean = y.mean(0)
  x = x - x_mean
  gram = (x.T @ x).astype(np.float64)
  projected = x.T @ (y - y_mean)
  scale = np.trace(gram) / len(gram)
  solutions = [
    np.linalg.solve(gram + ridge * scale * np.eye(len(gram)), projected)
    for ridge in ridges
  ]
  return [(weights, y_mean - x_mean @ weights) for weights in solutions]


def _log_softmax(scores: np.ndarray) -> np.ndarray:
  scores = scores - scores.max(-1, keepdims=True)
  return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

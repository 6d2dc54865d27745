"""Reads emotion and mouth opening off rendered faces: gradient histograms and a linear
map in closed form.

A measuring device for the synthetic data set only, where the truth is known. It is
quick to fit (no gradient descent), is made robust to mirroring, blur and noise, and
shares no code with the model it judges.
"""

import dataclasses
from typing import Self

import numpy as np
from PIL import Image
from scipy import ndimage

CROP = 64  # side of a face crop
_CENTRE = slice(8, 56)  # the 48 pixels that are looked at
_MOUTH = slice(22, 46), slice(12, 36)  # rows and columns of the mouth within the centre
_RIDGES = (0.01, 0.05, 0.2, 1.0, 5.0)  # in mean variances of a feature
_TEMPERATURES = np.geomspace(1, 32, 16)


def crop_faces(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """Cuts the face out of the frames of one clip.

  One box serves the whole clip: a box that followed the jaw would tell the opening by
  itself.

  Args:
    frames: uint8 [N,H,W,3].
    boxes: [4] or [N,4], x0, y0, x1, y1 in [0,1] of the picture; the outline of the
      face.

  Returns:
    uint8 [N,64,64,3].
  """
  height, width = frames.shape[1:3]
  x0, y0, x1, y1 = np.reshape(boxes, (-1, 4)).mean(0).clip(0, 1) * (
    width,
    height,
    width,
    height,
  )

  def cut(frame):
    return Image.fromarray(frame).resize(
      (CROP, CROP), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1)
    )

  return np.stack([np.asarray(cut(frame)) for frame in frames])


def face_features(crops: np.ndarray) -> np.ndarray:
  """Gradient histograms of face and mouth, and a small standardised grey picture:
  uint8 [N,64,64,3] -> [N,1476].
  """
  grey = (
    crops[:, _CENTRE, _CENTRE].astype(np.float32)
    @ np.float32([0.299, 0.587, 0.114])
    / 255
  )
  small = grey.reshape(-1, 24, 2, 24, 2).mean((2, 4)).reshape(len(grey), -1)
  small = (small - small.mean(1, keepdims=True)) / (small.std(1, keepdims=True) + 0.02)
  return np.concatenate(
    [
      _gradient_histograms(grey, 6),
      _gradient_histograms(grey[:, *_MOUTH], 4),
      0.2 * small,
    ],
    axis=1,
  )


def degrade(
  crops: np.ndarray, seed: int, blur: float = 2.0, noise: float = 10.0
) -> np.ndarray:
  """Blurs each crop by up to `blur` pixels and adds noise of up to `noise` grey
  levels (standard deviations).
  """
  rng = np.random.default_rng(seed)
  out = np.empty(crops.shape, np.float32)
  for i, (crop, sigma) in enumerate(zip(crops, rng.uniform(0, blur, len(crops)))):
    ndimage.gaussian_filter(crop.astype(np.float32), (sigma, sigma, 0), output=out[i])
  out += rng.standard_normal(out.shape, np.float32) * rng.uniform(
    0, noise, (len(out), 1, 1, 1)
  ).astype(np.float32)
  return (out + 0.5).clip(0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class FaceProbe:
  """Ridge regression from features to emotions and mouth opening.

  Make one with `FaceProbe.fit`.

  With references (a neutral crop of the same person for each crop) it looks at the
  change of the features only.
  """

  weights: np.ndarray  # [features, emotions + 1]
  offsets: np.ndarray  # [emotions + 1]
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

    The ridges and the softmax temperature are those that serve best on the last quarter
    of the frames: order the frames by person, so that these persons are new to the
    rest.

    Args:
      crops: uint8 [N,64,64,3].
      emotions: [N] indices.
      openings: [N] mouth openings, in any unit.
      reference: uint8 [N,64,64,3], a neutral crop of the same person for each crop.
      num_emotions: how many emotions there are.
      max_frames: of more frames evenly spaced ones are used.
      seed: of the degradations.
    """
    keep = (
      np.linspace(0, len(crops) - 1, min(len(crops), max_frames)).round().astype(int)
    )
    crops, emotions, openings = (
      crops[keep],
      np.asarray(emotions)[keep],
      np.asarray(openings, np.float64)[keep],
    )
    copies = [crops, degrade(crops, seed), degrade(crops[:, :, ::-1], seed + 1)]
    x = np.stack(
      [face_features(copy) for copy in copies], axis=1
    )  # [N, copies, features]
    if reference is not None:
      plain, mirrored = (
        face_features(reference[keep]),
        face_features(reference[keep, :, ::-1]),
      )
      x -= np.stack([plain, plain, mirrored], axis=1)
    y = np.concatenate([np.eye(num_emotions)[emotions], openings[:, None]], axis=1)
    y = np.repeat(y[:, None], len(copies), axis=1)

    known = len(x) * 3 // 4

    def flat(a):
      return a.reshape(-1, a.shape[-1])

    held_x, held_y = flat(x[known:]), flat(y[known:])
    tries = [
      held_x @ w + b for w, b in _ridge(flat(x[:known]), flat(y[:known]), _RIDGES)
    ]
    errors = [((guess - held_y) ** 2).mean(0) for guess in tries]
    best_emotion = int(np.argmin([error[:-1].mean() for error in errors]))
    best_opening = int(np.argmin([error[-1] for error in errors]))
    labels = held_y[:, :-1].argmax(1)

    def likelihood(t):
      return _log_softmax(t * tries[best_emotion][:, :-1])[
        np.arange(len(labels)), labels
      ].mean()

    temperature = max(_TEMPERATURES, key=likelihood)

    solutions = _ridge(flat(x), flat(y), (_RIDGES[best_emotion], _RIDGES[best_opening]))
    (weights, offsets), (opening_weights, opening_offsets) = solutions
    weights[:, -1], offsets[-1] = opening_weights[:, -1], opening_offsets[-1]
    return cls(weights, offsets, float(temperature))

  def emotion(
    self, crops: np.ndarray, reference: np.ndarray | None = None
  ) -> np.ndarray:
    """Log probabilities of the emotions: crops uint8 [N,64,64,3] -> [N,emotions].

    `reference` may be one crop.
    """
    return _log_softmax(self.temperature * self._read(crops, reference)[:, :-1])

  def opening(
    self, crops: np.ndarray, reference: np.ndarray | None = None
  ) -> np.ndarray:
    """Mouth opening in the unit of the truth that it was fitted to: crops uint8
    [N,64,64,3] -> [N].
    """
    return self._read(crops, reference)[:, -1]

  def _read(self, crops: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    x = face_features(crops)
    if reference is not None:
      x = x - face_features(reference)
    return x @ self.weights + self.offsets


def _gradient_histograms(grey: np.ndarray, cell: int) -> np.ndarray:
  """HOG with nine unsigned orientations (Dalal and Triggs, 2005): [N,S,S] -> [N, 9
  (S/cell)^2].
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
  return (histogram / np.sqrt(energy + (0.02 * cell) ** 2)[..., None]).reshape(
    len(grey), -1
  )


def _ridge(
  x: np.ndarray, y: np.ndarray, ridges: tuple[float, ...]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Least squares with an offset, x [N,D] -> y [N,K], once per ridge: (weights
  [D,K], offsets [K]).
  """
  x_mean, y_mean = x.mean(0), y.mean(0)
  x = x - x_mean
  gram, projected = (x.T @ x).astype(np.float64), x.T @ (y - y_mean)
  scale = np.trace(gram) / len(gram)
  solutions = [
    np.linalg.solve(gram + ridge * scale * np.eye(len(gram)), projected)
    for ridge in ridges
  ]
  return [(weights, y_mean - x_mean @ weights) for weights in solutions]


def _log_softmax(scores: np.ndarray) -> np.ndarray:
  scores = scores - scores.max(-1, keepdims=True)
  return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

"""How well emotion priors separate emotions, and how much of the speaker they still
tell (paper section 4.5).
"""

from typing import Any

import numpy as np


def clustering_strength(
  features: np.ndarray, identity: np.ndarray, emotion: np.ndarray
) -> dict[Any, float]:
  """d_inter / d_intra per emotion, among the emotions of one person, averaged over
  people (paper table 5).

  With Euclidean distances: d_intra is the mean distance of an emotion's clips to their
  centroid, d_inter the mean distance of that centroid to the person's other centroids.
  Emotions with one clip and people with one emotion are left out.

  Args:
    features: `[N,D]`, usually mu.
    identity, emotion: `[N]`, any labels.

  Returns:
    Emotion to ratio; without those that no person has.
  """
  features, ratios = np.asarray(features, np.float64), {}
  for person in np.unique(identity):
    groups = {
      kind: features[(identity == person) & (emotion == kind)]
      for kind in np.unique(emotion)
    }
    groups = {kind: rows for kind, rows in groups.items() if len(rows) > 1}
    if len(groups) < 2:
      continue
    centroids = {kind: rows.mean(axis=0) for kind, rows in groups.items()}
    for kind, rows in groups.items():
      others = [other for name, other in centroids.items() if name != kind]
      inter = np.linalg.norm(others - centroids[kind], axis=1).mean()
      intra = np.linalg.norm(rows - centroids[kind], axis=1).mean()
      ratios.setdefault(kind, []).append(inter / intra if intra else np.inf)
  return {kind: float(np.mean(values)) for kind, values in ratios.items()}


def nearest_centroid_accuracy(
  features: np.ndarray, label: np.ndarray, fold: np.ndarray
) -> float:
  """How often the nearest centroid of a label, made of the other folds, is the right
  one.

  With `label` the emotion and `fold` the identity it asks whether emotions are shared
  between people.

  Args:
    features: `[N,D]`.
    label: `[N]`.
    fold: `[N]`, at least two different values.

  Returns:
    Accuracy over all N.
  """

  def predict(rows, labels, queries):
    kinds = np.unique(labels)
    centroids = np.stack([rows[labels == kind].mean(axis=0) for kind in kinds])
    return kinds[_square_distances(queries, centroids).argmin(axis=1)]

  return _held_out_accuracy(predict, features, label, fold)


def linear_probe_accuracy(
  features: np.ndarray, label: np.ndarray, fold: np.ndarray, ridge: float = 1e-3
) -> float:
  """How often a linear classifier, fitted to the other folds, is right: what the
  features tell about a label.

  The classifier is ridge regression to one-hot labels on standardised features, which
  has a closed form.

  Args:
    features: `[N,D]`.
    label: `[N]`.
    fold: `[N]`, at least two different values; see `folds_within`.
    ridge: weight of the penalty, relative to the number of rows.

  Returns:
    Accuracy over all N.
  """

  def predict(rows, labels, queries):
    kinds, target = np.unique(labels, return_inverse=True)
    mean, scale = rows.mean(axis=0), rows.std(axis=0) + 1e-8
    x = _with_ones((rows - mean) / scale)
    penalty = ridge * len(x) * np.diag([1.0] * rows.shape[1] + [0.0])
    weight = np.linalg.lstsq(
      x.T @ x + penalty, x.T @ np.eye(len(kinds))[target], rcond=None
    )[0]
    return kinds[(_with_ones((queries - mean) / scale) @ weight).argmax(axis=1)]

  return _held_out_accuracy(predict, features, label, fold)


def recall_at_1(features: np.ndarray, label: np.ndarray) -> float:
  """How often the most similar other row (by cosine) has the same label, over rows
  whose label occurs twice.
  """
  features = np.asarray(features, np.float64)
  unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
  similarity = unit @ unit.T
  np.fill_diagonal(similarity, -np.inf)
  _, code, count = np.unique(label, return_inverse=True, return_counts=True)
  hit = code[similarity.argmax(axis=1)] == code
  return float(hit[count[code] > 1].mean())


def folds_within(label: np.ndarray, folds: int = 4) -> np.ndarray:
  """Deals the rows of each label out to `folds` folds in turn: int `[N]`."""
  fold = np.zeros(len(label), int)
  for kind in np.unique(label):
    rows = np.flatnonzero(label == kind)
    fold[rows] = np.arange(len(rows)) % folds
  return fold


def summary(
  mu: np.ndarray, identity: np.ndarray, emotion: np.ndarray
) -> dict[str, float]:
  """What tells a good emotion embedder from a bad one, on clips of unseen people.

  Args:
    mu: `[N,D]`, prior means.
    identity, emotion: `[N]`, any labels.

  Returns:
    `norm` of mu. Of several clips `mean_cosine`; of several people `emotion_accuracy`
    (nearest centroid of other people), and, if any has several clips,
    `identity_accuracy` (linear probe; should fall); and where people have several clips
    of an emotion `clustering` (mean over emotions), `clustering/EMOTION` of each, and
    `recall_at_1` of (identity, emotion).
  """
  mu = np.asarray(mu, np.float64)
  person, kind = (
    np.unique(label, return_inverse=True)[1] for label in (identity, emotion)
  )
  group = person * len(mu) + kind
  norm = np.linalg.norm(mu, axis=1)
  unit = mu / np.maximum(norm, 1e-12)[:, None]
  others = ~np.eye(len(mu), dtype=bool)
  scores = {}
  if strength := clustering_strength(mu, identity, emotion):
    scores |= {
      'clustering': float(np.mean(list(strength.values()))),
      'recall_at_1': recall_at_1(mu, group),
    }
    scores |= {f'clustering/{name}': ratio for name, ratio in strength.items()}
  if person.any():
    scores['emotion_accuracy'] = nearest_centroid_accuracy(mu, emotion, identity)
    fold = folds_within(identity)
    if fold.any():  # else all clips are in one fold, and nothing is left to learn from
      scores['identity_accuracy'] = linear_probe_accuracy(mu, identity, fold)
  scores['norm'] = float(norm.mean())
  if others.any():
    scores['mean_cosine'] = float((unit @ unit.T)[others].mean())
  return scores


def _held_out_accuracy(
  predict, features: np.ndarray, label: np.ndarray, fold: np.ndarray
) -> float:
  """Each fold is predicted from all others by `predict(rows, labels, queries)`."""
  features, hits = np.asarray(features, np.float64), 0
  for held_out in np.unique(fold):
    test = fold == held_out
    hits += int(
      (predict(features[~test], label[~test], features[test]) == label[test]).sum()
    )
  return hits / len(label)


def _square_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.square(a[:, None] - b[None]).sum(axis=-1)


def _with_ones(x: np.ndarray) -> np.ndarray:
  return np.concatenate([x, np.ones((len(x), 1))], axis=1)

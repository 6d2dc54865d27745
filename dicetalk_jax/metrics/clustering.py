"""How well emotion priors separate emotions, and how much of the speaker they reveal
(paper section 4.5).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

# Predicts the labels of queries from rows and their labels: (rows, labels, queries).
_Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def clustering_strength(
  features: np.ndarray, identity: np.ndarray, emotion: np.ndarray
) -> dict[Any, float]:
  """d_inter / d_intra per emotion, among the emotions of one identity, averaged over
  identities (paper table 5).

  With Euclidean distances: d_intra is the mean distance of an emotion's clips to their
  centroid, d_inter the mean distance of that centroid to the other centroids of the
  identity. Emotions with one clip and identities with one emotion are left out.

  Args:
    features: `[N,D]`, usually mu.
    identity, emotion: `[N]`, any labels.

  Returns:
    Emotion to ratio; without those that no identity has.
  """
  features = np.asarray(features, np.float64)
  ratios: dict[Any, list[float]] = {}
  for one in np.unique(identity):
    groups = {}
    for kind in np.unique(emotion):
      rows = features[(identity == one) & (emotion == kind)]
      if len(rows) > 1:
        groups[kind] = rows
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
  """How often the nearest centroid of a label, from all other folds, is right.

  With `label` the emotion and `fold` the identity it measures whether identities share
  their emotions.

  Args:
    features: `[N,D]`.
    label: `[N]`.
    fold: `[N]`, at least two different values.

  Returns:
    Accuracy over all N.
  """

  # sklearn's NearestCentroid refuses one label and features that are all alike.
  def predict(rows, labels, queries):
    kinds = np.unique(labels)
    centroids = np.stack([rows[labels == kind].mean(axis=0) for kind in kinds])
    distances = np.square(queries[:, None] - centroids).sum(axis=-1)
    return kinds[distances.argmin(axis=1)]

  return _held_out_accuracy(predict, features, label, fold)


def linear_probe_accuracy(
  features: np.ndarray, label: np.ndarray, fold: np.ndarray, ridge: float = 1e-3
) -> float:
  """How often a linear classifier, fitted to all other folds, is right: what the
  features reveal about a label.

  The classifier is ridge regression to one-hot labels on standardised features.

  Args:
    features: `[N,D]`.
    label: `[N]`.
    fold: `[N]`, at least two different values; see `folds_within`.
    ridge: weight of the penalty, relative to the number of rows.

  Returns:
    Accuracy over all N.
  """
  # The imports take a second.
  from sklearn.linear_model import RidgeClassifier
  from sklearn.pipeline import make_pipeline
  from sklearn.preprocessing import StandardScaler

  def predict(rows, labels, queries):
    probe = RidgeClassifier(alpha=ridge * len(rows))
    return make_pipeline(StandardScaler(), probe).fit(rows, labels).predict(queries)

  return _held_out_accuracy(predict, features, label, fold)


def _held_out_accuracy(
  predict: _Predict, features: np.ndarray, label: np.ndarray, fold: np.ndarray
) -> float:
  """Accuracy over all rows, with each fold predicted from all others."""
  from sklearn.model_selection import LeaveOneGroupOut

  features = np.asarray(features, np.float64)
  hits = 0
  for known, held_out in LeaveOneGroupOut().split(features, label, fold):
    predicted = predict(features[known], label[known], features[held_out])
    hits += int((predicted == label[held_out]).sum())
  return hits / len(label)


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
  """Measures an emotion embedder on clips of identities that it has not seen.

  Args:
    mu: `[N,D]`, prior means.
    identity, emotion: `[N]`, any labels.

  Returns:
    `norm` of mu. Of several clips `mean_cosine`; of several identities
    `emotion_accuracy` (nearest centroid of other identities), and, if any has several
    clips, `identity_accuracy` (linear probe; should fall); and where identities have
    several clips of an emotion `clustering` (mean over emotions), `clustering/EMOTION`
    of each, and `recall_at_1` of (identity, emotion).
  """
  mu = np.asarray(mu, np.float64)
  _, identity_code = np.unique(identity, return_inverse=True)
  _, emotion_code = np.unique(emotion, return_inverse=True)
  scores = {}

  # Emotions within each identity.
  if strength := clustering_strength(mu, identity, emotion):
    scores['clustering'] = float(np.mean(list(strength.values())))
    scores['recall_at_1'] = recall_at_1(mu, identity_code * len(mu) + emotion_code)
    scores |= {f'clustering/{name}': ratio for name, ratio in strength.items()}

  # Emotions across identities, and identities themselves.
  if identity_code.any():
    scores['emotion_accuracy'] = nearest_centroid_accuracy(mu, emotion, identity)
    fold = folds_within(identity)
    if fold.any():  # else all clips are in one fold, and nothing is left to learn from
      scores['identity_accuracy'] = linear_probe_accuracy(mu, identity, fold)

  # Where all clips lie.
  norm = np.linalg.norm(mu, axis=1)
  scores['norm'] = float(norm.mean())
  if len(mu) > 1:
    unit = mu / np.maximum(norm, 1e-12)[:, None]
    different = ~np.eye(len(mu), dtype=bool)
    scores['mean_cosine'] = float((unit @ unit.T)[different].mean())
  return scores

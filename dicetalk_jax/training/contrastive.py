"""Contrastive training of the emotion embedder: modality dropout, pairs and InfoNCE
(paper section 3.1).
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from dicetalk_jax.errors import ConfigError

SIMILARITIES = ('cosine', 'inv_dist')
OTHER_PEOPLE = ('negative', 'ignored', 'positive')


class Pairs(NamedTuple):
  """Pairs that attract and pairs that repel each other.

  Both are symmetric and False for i = j. Pairs that are neither positive nor negative
  are ignored.
  """

  positive: jax.Array  # bool [B,B]
  negative: jax.Array  # bool [B,B]


def make_pairs(
  identity: jax.Array,
  emotion: jax.Array,
  video: jax.Array,
  level: jax.Array | None = None,
  other_people: str = 'negative',
) -> Pairs:
  """Decides which samples attract and which repel each other (paper sections 3.1 and
  4.1).

  Labelled clips of one identity are positives if the emotion is the same, negatives if
  not. Windows of one unlabelled video are positives; other unlabelled clips of an
  identity are ignored, as their emotion may or may not be the same. Different
  identities are negatives, but see `other_people`.

  Args:
    identity: int `[B]`; equal numbers are the same identity, over all data sets.
    emotion: int `[B]`, -1 for unlabelled clips.
    video: int `[B]`; equal numbers are the same recording.
    level: int `[B]` intensities; if given, positives among labelled clips must share
      it, and clips of one emotion but different levels are ignored.
    other_people: what clips of one emotion but different identities are: 'negative', as
      in the paper, so that the prior has to distinguish identities; 'ignored', so that
      it need not; or 'positive', so that it must not.

  Raises:
    ConfigError: `other_people` is something else.
  """
  if other_people not in OTHER_PEOPLE:
    raise ConfigError(
      f'other_people={other_people!r} is unknown; choose one of '
      f'{", ".join(OTHER_PEOPLE)}'
    )

  def same(x):
    return x[:, None] == x[None]

  labelled = emotion >= 0
  both_labelled = labelled[:, None] & labelled[None]
  none_labelled = ~labelled[:, None] & ~labelled[None]
  same_identity = same(identity)
  same_emotion = both_labelled & same(emotion)
  alike = same_emotion if level is None else same_emotion & same(level)

  # Within an identity.
  itself = jnp.eye(len(identity), dtype=bool)
  positive = same_identity & (alike | (none_labelled & same(video))) & ~itself
  negative = ~same_identity | (both_labelled & ~same_emotion)

  # Between identities.
  if other_people != 'negative':
    negative &= ~same_emotion
  if other_people == 'positive':
    positive |= ~same_identity & alike
  return Pairs(positive, negative)


def similarity_matrix(s: jax.Array, similarity: str = 'cosine') -> jax.Array:
  """Computes zeta of all pairs of rows of s `[B,D]`: float32 `[B,B]`.

  'cosine' is the paper's; 'inv_dist' is 1 / (1 + |s_i - s_j|), which saturates for
  distant pairs.

  Raises:
    ConfigError: `similarity` is something else.
  """
  if similarity not in SIMILARITIES:
    raise ConfigError(
      f'similarity={similarity!r} is unknown; choose one of {", ".join(SIMILARITIES)}'
    )
  s = s.astype(jnp.float32)
  products = jnp.matmul(s, s.T, precision='highest')
  square = jnp.square(s).sum(axis=1)
  # The floors keep slopes finite: that of a root is infinite at 0, which equal rows
  # (and i = j) reach.
  if similarity == 'cosine':
    scale = lax.rsqrt(jnp.maximum(square, 1e-12))
    return products * scale[:, None] * scale[None]
  squared_distance = square[:, None] + square[None] - 2 * products
  return 1 / (1 + jnp.sqrt(jnp.maximum(squared_distance, 1e-12)))


def info_nce(
  s: jax.Array,
  pairs: Pairs,
  *,
  tau: float = 0.1,
  sim_offset: float = 1.0,
  similarity: str = 'cosine',
) -> jax.Array:
  """Computes InfoNCE with one positive at a time in the denominator (paper equations 7
  and 8).

  Averages over the positives of each anchor, then over anchors with a positive and a
  negative. Call it on the global batch, so that samples of all devices meet.

  Args:
    s: `[B,D]`, samples of the priors (or their means).
    pairs: see `make_pairs`.
    tau: temperature.
    sim_offset: the paper's constant c, added to every similarity; it cancels.
    similarity: see `similarity_matrix`.

  Returns:
    float32 scalar; 0 for a batch without any anchor.
  """
  logit = (similarity_matrix(s, similarity) + sim_offset) / tau

  # 1. The loss of each positive pair: with n = logsumexp over negatives, it is
  # -log(e^p / (e^p + e^n)) = softplus(n - p). Masks are large but finite numbers, so
  # that neither value nor gradient can be NaN.
  n = jax.nn.logsumexp(jnp.where(pairs.negative, logit, -1e30), axis=1)
  losses = jnp.where(pairs.positive, jax.nn.softplus(n[:, None] - logit), 0)

  # 2. The mean over the positives of each anchor
  positives = pairs.positive.sum(axis=1)
  means = losses.sum(axis=1) / jnp.maximum(positives, 1)

  # 3. The mean over anchors
  is_anchor = (positives > 0) & pairs.negative.any(axis=1)
  return jnp.where(is_anchor, means, 0).sum() / jnp.maximum(is_anchor.sum(), 1)


def modality_dropout(
  key: jax.Array,
  has_video: jax.Array,
  has_audio: jax.Array,
  *,
  video: float = 0.2,
  audio: float = 0.2,
) -> tuple[jax.Array, jax.Array]:
  """Drops video or audio, never both (paper sections 3.1 and 4.1): one uniform draw per
  sample.

  Args:
    key: of the draw.
    has_video, has_audio: bool `[B]`, whether each clip has this modality; its only one
      is never dropped.
    video, audio: probability that this modality is dropped.

  Returns:
    `has_video` and `has_audio` after the dropout.
  """
  u = jax.random.uniform(key, has_video.shape)
  drop_video = (u < video) & has_audio
  drop_audio = (u >= video) & (u < video + audio) & has_video
  return has_video & ~drop_video, has_audio & ~drop_audio

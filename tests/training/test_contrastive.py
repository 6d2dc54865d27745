"""Pairs, InfoNCE against its definition, and modality dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax.errors import ConfigError
from dicetalk_jax.training.contrastive import (
  Pairs,
  info_nce,
  make_pairs,
  modality_dropout,
  similarity_matrix,
)

# Two people of a labelled corpus, then a person with two unlabelled videos.
IDENTITY = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
EMOTION = np.array([3, 3, 3, 5, 3, 5, -1, -1, -1])
LEVEL = np.array([1, 1, 2, 1, 1, 1, 0, 0, 0])
VIDEO = np.array([0, 1, 2, 3, 4, 5, 6, 6, 7])


def verdict(i, j, level_aware, other_people):
  """The rules, one pair at a time: 1 positive, -1 negative, 0 ignored."""
  if i == j:
    return 0
  if IDENTITY[i] != IDENTITY[j]:
    if EMOTION[i] < 0 or EMOTION[i] != EMOTION[j] or other_people == 'negative':
      return -1
    return (
      1
      if other_people == 'positive' and not (level_aware and LEVEL[i] != LEVEL[j])
      else 0
    )
  if EMOTION[i] >= 0:  # both labelled, as the corpora have different people
    if EMOTION[i] != EMOTION[j]:
      return -1
    return 0 if level_aware and LEVEL[i] != LEVEL[j] else 1
  return 1 if VIDEO[i] == VIDEO[j] else 0


@pytest.mark.parametrize('other_people', ['negative', 'ignored', 'positive'])
@pytest.mark.parametrize('level_aware', [False, True])
def test_pair_rules(level_aware, other_people):
  pairs = make_pairs(
    IDENTITY, EMOTION, VIDEO, LEVEL if level_aware else None, other_people
  )
  expected = np.array(
    [[verdict(i, j, level_aware, other_people) for j in range(9)] for i in range(9)]
  )
  np.testing.assert_array_equal(
    np.int32(pairs.positive) - np.int32(pairs.negative), expected
  )
  assert not (pairs.positive & pairs.negative).any()
  assert (expected == 0).sum() > 9  # some pairs besides the diagonal are ignored


def test_unknown_pair_rule():
  with pytest.raises(
    ConfigError, match="other_people='friends' is unknown; choose one of negative"
  ):
    make_pairs(IDENTITY, EMOTION, VIDEO, other_people='friends')


def test_person_in_labelled_and_unlabelled_data_is_ignored():
  pairs = make_pairs(np.zeros(2, int), np.array([4, -1]), np.zeros(2, int))
  assert not pairs.positive.any()
  assert not pairs.negative.any()


def naive(s, pairs, tau, offset, similarity):
  """Paper equation 8 as it stands, in float64."""
  s = np.float64(s)
  if similarity == 'cosine':
    unit = s / np.linalg.norm(s, axis=1, keepdims=True)
    zeta = unit @ unit.T
  else:
    zeta = 1 / (1 + np.linalg.norm(s[:, None] - s[None], axis=-1))
  e = np.exp((zeta + offset) / tau)
  anchors = []
  for i in range(len(s)):
    positives, negatives = (np.flatnonzero(mask[i]) for mask in pairs)
    if len(positives) and len(negatives):
      anchors.append(
        np.mean(
          [-np.log(e[i, p] / (e[i, p] + e[i, negatives].sum())) for p in positives]
        )
      )
  return np.mean(anchors)


@pytest.fixture(scope='module')
def s():
  return np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32) + 0.5


@pytest.mark.parametrize('similarity', ['cosine', 'inv_dist'])
@pytest.mark.parametrize('tau', [0.1, 0.03])
def test_equals_equation_8(s, similarity, tau):
  pairs = make_pairs(IDENTITY, EMOTION, VIDEO)
  loss = info_nce(s, pairs, tau=tau, similarity=similarity)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, naive(s, pairs, tau, 1.0, similarity), rtol=1e-5)
  # The last sample has no positive, so it is nobody's anchor; as a negative it matters.
  assert not np.isclose(
    loss,
    naive(s[:8], Pairs(*(m[:8, :8] for m in pairs)), tau, 1.0, similarity),
    rtol=1e-3,
  )


def test_offset_cancels(s):
  pairs = make_pairs(IDENTITY, EMOTION, VIDEO)
  value = jax.jit(
    lambda s, c: jax.value_and_grad(lambda s: info_nce(s, pairs, sim_offset=c))(s)
  )
  loss, grad = value(s, 0.0)
  for offset in (1.0, -2.0):
    other, other_grad = value(s, offset)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    np.testing.assert_allclose(other_grad, grad, atol=1e-5 * np.abs(grad).max())


def test_ignored_pairs_have_no_gradient(s):
  """Sample 8 is unlabelled: of its own person it is ignored, so only other people's
  samples feel it.
  """
  pairs = make_pairs(IDENTITY, EMOTION, VIDEO)
  # Person 2 alone: only positives and ignored pairs, plus one negative for 6 and 7.
  only = np.arange(9) >= 6
  pairs = Pairs(*(np.asarray(mask) & only & only[:, None] for mask in pairs))
  negative = pairs.negative.copy()
  negative[6, 0] = negative[7, 0] = True
  grad = jax.grad(lambda s: info_nce(s, Pairs(pairs.positive, negative)))(s)
  assert not grad[8].any()
  assert not grad[1:6].any()
  assert grad[0].any() and grad[6].any()


@pytest.mark.parametrize('similarity', ['cosine', 'inv_dist'])
def test_finite_on_degenerate_batches(similarity):
  """Equal rows, zero rows, and batches in which nobody is an anchor."""

  def value(s, pairs):
    return jax.value_and_grad(lambda s: info_nce(s, pairs, similarity=similarity))(s)

  pairs = make_pairs(IDENTITY, EMOTION, VIDEO)
  for rows in (np.zeros((9, 4)), np.ones((9, 4)), np.full((9, 4), 1e4)):
    loss, grad = value(jnp.asarray(rows, jnp.float32), pairs)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()
  alone = make_pairs(np.arange(9), EMOTION, VIDEO)  # no positive anywhere
  friends = make_pairs(
    np.zeros(9, int), np.zeros(9, int), VIDEO
  )  # no negative anywhere
  for pairs in (alone, friends):
    loss, grad = value(jnp.ones((9, 4)), pairs)
    assert loss == 0
    assert not grad.any()


def test_computes_in_float32(s):
  half = jnp.asarray(s, jnp.bfloat16)
  matrix = similarity_matrix(half)
  assert matrix.dtype == jnp.float32
  np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-6)
  with pytest.raises(ConfigError, match='choose one of cosine, inv_dist'):
    similarity_matrix(s, 'dot')


def test_modality_dropout():
  n = 100_000
  everything = np.ones(n, bool)
  has_video, has_audio = modality_dropout(
    jax.random.key(0), everything, everything, video=0.2, audio=0.3
  )
  assert (has_video | has_audio).all()  # never both
  for kept, rate in ((has_video, 0.2), (has_audio, 0.3)):
    dropped = 1 - np.asarray(kept).mean()
    assert abs(dropped - rate) < 4 * np.sqrt(rate * (1 - rate) / n)


def test_only_modality_is_never_dropped():
  n = 10_000
  for video, audio in ((True, False), (False, True), (False, False)):
    before = np.full(n, video), np.full(n, audio)
    after = modality_dropout(jax.random.key(1), *before, video=0.5, audio=0.5)
    np.testing.assert_array_equal(after, before)

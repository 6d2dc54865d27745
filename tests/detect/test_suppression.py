"""Boxes that overlap, and the better ones that stay."""

import numpy as np
import pytest

from dicetalk_jax.detect import suppression

# In a row; each overlaps the next by a half, and no other.
ROW = np.array([[i * 10.0, 0, i * 10 + 20, 10] for i in range(4)])
SCORES = np.array([0.6, 0.9, 0.8, 0.7])


def test_overlaps():
  shared = suppression.overlaps(ROW, ROW)
  assert shared[0, 0] == 1 and shared[0, 2] == 0
  assert shared[0, 1] == pytest.approx(1 / 3)
  inner = np.array([[0.0, 0, 20, 20], [5, 5, 10, 10]])
  assert suppression.overlaps(inner, inner, of_smaller=True)[0, 1] == 1


def test_what_a_suppressed_box_overlaps_stays_if_greedy():
  """1 beats 0 and 2; 3 overlaps 2 only."""
  assert suppression.greedy(ROW, SCORES, 0.3).tolist() == [1, 3]
  assert suppression.strict(ROW, SCORES, 0.3).tolist() == [1]
  assert suppression.greedy(ROW, SCORES, 0.4).tolist() == [1, 2, 3, 0]


def test_an_overlap_at_the_limit_stays():
  halves = np.array([[0.0, 0, 2, 1], [0, 0, 1, 1]])
  scores = np.array([0.9, 0.8])
  assert len(suppression.greedy(halves, scores, 0.5)) == 2
  assert len(suppression.strict(halves, scores, 0.49)) == 1


def test_equal_scores_keep_their_order_and_nothing_stays_nothing():
  apart = ROW * [3, 1, 3, 1]
  assert suppression.greedy(apart, np.ones(4), 0.5).tolist() == [0, 1, 2, 3]
  for suppress in (suppression.greedy, suppression.strict):
    assert len(suppress(np.zeros((0, 4)), np.zeros(0), 0.5)) == 0

"""Window indices against a naive loop and recorded ones; overlaps, wraps, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax.diffusion import windows

# (T, F, overlap, offset, steps): the recorded cases first (17 frames revisit three;
# overlap 1), then unusual ones.
CASES = [
  (17, 5, 0, 2, 4),
  (11, 4, 1, 3, 4),
  (150, 25, 0, 7, 25),
  (26, 25, 0, 7, 5),
  (3, 2, 1, 1, 5),
  (9, 4, 3, 5, 6),
]


def naive(total, frames, overlap, offset, steps):
  """The loop of the reference implementation, literally."""
  plan = []
  shift = 0
  for _ in range(steps):
    plan.append(
      [
        [(start - shift + j) % total for j in range(frames)]
        for start in range(0, total, frames - overlap)
      ]
    )
    shift = (shift + offset) % frames
  return plan


@pytest.mark.parametrize('case', CASES)
def test_indices(case):
  total, frames, overlap, offset, steps = case
  # A clip in a larger bucket.
  bucket = windows.count(total + 13, frames, overlap) + 1
  shifts = windows.shifts(steps, offset, frames)
  for shift, expected in zip(shifts, naive(*case)):
    index, exists = windows.indices(
      jnp.arange(bucket), shift, jnp.int32(total), frames, overlap
    )
    assert int(exists.sum()) == len(expected) == windows.count(total, frames, overlap)
    assert exists[: len(expected)].all()
    np.testing.assert_array_equal(index[: len(expected)], expected)
    assert index.min() >= 0 and index.max() < total


def test_published_lists():
  """Third and last step of the recorded pipeline runs."""

  def index(n, shift, *case):
    return windows.indices(jnp.arange(n), shift, *case)[0].tolist()

  assert index(4, windows.shifts(4, 2, 5)[2], 17, 5, 0) == [
    [13, 14, 15, 16, 0],
    [1, 2, 3, 4, 5],
    [6, 7, 8, 9, 10],
    [11, 12, 13, 14, 15],
  ]
  assert index(4, windows.shifts(4, 3, 4)[3], 11, 4, 1) == [
    [10, 0, 1, 2],
    [2, 3, 4, 5],
    [5, 6, 7, 8],
    [8, 9, 10, 0],
  ]
  assert windows.shifts(6, 7, 25).tolist() == [0, 7, 14, 21, 3, 10]
  assert windows.shifts(6, 7, None).tolist() == [0, 7, 14, 21, 28, 35]  # Sonic


@pytest.mark.parametrize('case', CASES[:2])
def test_average(case):
  total, frames, overlap, offset, _ = case
  values = jnp.float32(np.random.default_rng(0).normal(size=(8, frames, 2)))
  index, exists = windows.indices(
    jnp.arange(8), offset, jnp.int32(total), frames, overlap
  )
  sums, counts = windows.accumulate(
    jnp.zeros((30, 2)), jnp.zeros(30, jnp.int32), values, index, exists
  )
  expected, visits = np.zeros((30, 2)), np.zeros(30, int)
  for window in range(windows.count(total, frames, overlap)):
    for j, i in enumerate(np.asarray(index[window])):
      expected[i] += values[window, j]
      visits[i] += 1
  np.testing.assert_array_equal(counts, visits)
  assert visits.max() == 2 and visits[:total].min() == 1
  merged = jax.jit(windows.average)(sums, counts)
  np.testing.assert_allclose(
    merged[:total], expected[:total] / visits[:total, None], atol=1e-6
  )
  assert not merged[total:].any()

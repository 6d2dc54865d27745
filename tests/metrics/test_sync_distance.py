"""Sync-C and Sync-D on made embeddings."""

import numpy as np
import pytest

from dicetalk_jax.metrics.sync_distance import sync_scores


def _towers(late=0, noise=0.0, frames=80, seed=0):
  """Lips, and the same embeddings as audio `late` frames later."""
  rng = np.random.default_rng(seed)
  track = rng.normal(size=(frames + 40, 16))
  lips = track[20 : 20 + frames]
  audio = track[20 - late : 20 - late + frames]
  return lips, audio + noise * rng.normal(size=audio.shape)


@pytest.mark.parametrize('late', [-7, 0, 4])
def test_known_shift_is_found(late):
  score = sync_scores(*_towers(late, noise=0.1))
  assert score.offset == late and score.confidence > 3
  # Apart from the frames whose audio is beyond the clip's ends, only noise is left.
  assert score.distance == pytest.approx(
    0.4 * (80 - abs(late)) / 80 + 4 * abs(late) / 80, abs=0.1
  )


def test_scores_by_hand():
  score = sync_scores(np.array([[3.0], [4.0]]), np.array([[3.0], [5.0]]), max_shift=3)
  # Shifts -3 to 3; the outer ones compare with zeros only.
  distances = [3.5, 3.5, (3 + 1) / 2, (0 + 1) / 2, (2 + 4) / 2, 3.5, 3.5]
  assert score == (np.median(distances) - 0.5, 0.5, 0)


def test_other_audio_gives_no_confidence():
  own = [sync_scores(*_towers(noise=0.5, seed=i)) for i in range(5)]
  other = [sync_scores(_towers(seed=i)[0], _towers(seed=i + 50)[1]) for i in range(5)]
  assert min(s.confidence for s in own) > 3 > 0.5 > max(s.confidence for s in other)
  assert max(s.distance for s in own) < min(s.distance for s in other)


@pytest.mark.parametrize('shapes', [((4, 2), (5, 2)), ((4,), (4,)), ((0, 2), (0, 2))])
def test_towers_must_fit(shapes):
  with pytest.raises(ValueError, match='one shape'):
    sync_scores(*map(np.zeros, shapes))

"""Lip sync on made tracks."""

import numpy as np
import pytest

from dicetalk_jax.metrics.lip_sync import lip_sync


def _mouth(seed, length=100):
  noise = np.random.default_rng(seed).standard_normal(length + 8)
  return np.convolve(noise, np.hanning(9), 'valid')


@pytest.mark.parametrize('late', [-4, 0, 3])
def test_lips_that_come_late_have_a_positive_offset(late):
  track = _mouth(0, 120)
  truth = track[10:110]
  noise = np.random.default_rng(1).standard_normal(100)
  opening = track[10 - late : 110 - late] + 0.2 * noise
  score = lip_sync(opening, truth, fps=25)
  assert score.offset == late
  assert score.offset_seconds == late / 25
  assert score.confidence > 0.7
  assert (score.correlation > 0.95) == (late == 0)


def test_other_audio_gives_little_confidence():
  own = [lip_sync(_mouth(i), _mouth(i), 25).confidence for i in range(10)]
  other = [lip_sync(_mouth(i), _mouth(i + 50), 25).confidence for i in range(10)]
  assert min(own) > max(other)


def test_scores_ignore_scale_and_brightness():
  opening = _mouth(2)
  truth = _mouth(2) + 0.3 * _mouth(3)
  score = lip_sync(opening, truth, 25)
  scaled = lip_sync(5 * opening - 3, 0.1 * truth + 2, 25)
  np.testing.assert_allclose(scaled, score, atol=1e-12)


def test_a_still_mouth_scores_nothing():
  assert lip_sync(np.full(60, 0.3), _mouth(0, 60), 25) == (0.0, 0, 0.0, 0.0)


def test_tracks_must_fit():
  for a, b in [(np.zeros(50), np.zeros(49)), (np.zeros(10), np.zeros(10))]:
    with pytest.raises(ValueError):
      lip_sync(a, b, 25)

"""Priors of data sets: which clips each is the mean of."""

import types
from unittest import mock

import numpy as np

from dicetalk_jax.training.mean_priors import averaged_clips, mean_gaussians

TABLE = types.SimpleNamespace(
  emotion=np.array(['happy', 'happy', 'happy', 'neutral', 'unknown', 'happy']),
  intensity=np.array([1, 3, 3, 1, 0, 0]),
)


def test_the_plain_name_is_the_mean_of_all_levels():
  clips = averaged_clips([TABLE], by_intensity=True)
  assert {name: list(np.flatnonzero(chosen)) for name, chosen in clips.items()} == {
    'happy': [0, 1, 2, 5],
    'happy_1': [0],
    'happy_3': [1, 2],
    'neutral': [3],
  }
  assert set(averaged_clips([TABLE])) == {'happy', 'neutral'}


def test_a_prior_is_the_mean_of_means_and_deviations():
  rng = np.random.default_rng(0)
  statistics = rng.normal(size=(6, 1, 2, 4)).astype(np.float32)
  feature = mock.MagicMock(side_effect=statistics.__getitem__)
  feature.__len__.return_value = len(statistics)
  mean, deviation = mean_gaussians([feature], [TABLE])['happy']
  expected = statistics[[0, 1, 2, 5], 0].mean(0)
  np.testing.assert_allclose([mean, deviation], expected, rtol=1e-6)

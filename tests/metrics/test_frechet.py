"""The Fréchet distance against closed forms and the matrix root."""

import numpy as np
import pytest
from scipy import linalg

from dicetalk_jax.metrics.frechet import frechet_distance


def _draw(seed, samples=400, features=6):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(samples, features)) @ rng.normal(size=(features, features))


@pytest.mark.parametrize('samples', [400, 5])
def test_a_set_is_at_no_distance_from_itself(samples):
  x = _draw(0, samples)
  assert abs(frechet_distance(x, x[::-1])) < 1e-10 * x.var(0).sum()


def test_shifted_and_stretched_sets_have_the_closed_form():
  """A shift d adds |d|^2; a factor s on commuting covariances (s - 1)^2 times the
  trace.
  """
  x = _draw(1)
  shift = np.arange(6.0)
  assert frechet_distance(x, x + shift) == pytest.approx(55.0, rel=1e-10)
  stretched = x.mean(0) + 1.5 * (x - x.mean(0))
  want = 0.25 * np.trace(np.cov(x.T))
  assert frechet_distance(x, stretched) == pytest.approx(want, rel=1e-10)


def test_equals_the_matrix_root():
  x, y = _draw(2), _draw(3, samples=300) + 1
  first, second = np.cov(x.T), np.cov(y.T)
  root = linalg.sqrtm(first @ second).real
  expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(
    first + second - 2 * root
  )
  assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)
  assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-8)


def test_fewer_samples_than_features():
  x, y = _draw(4, samples=4, features=16), _draw(5, samples=7, features=16)
  first, second = np.cov(x.T), np.cov(y.T)
  eigenvalues = np.linalg.eigvals(first @ second).real.clip(0)
  expected = (
    np.square(x.mean(0) - y.mean(0)).sum()
    + np.trace(first + second)
    - 2 * np.sqrt(eigenvalues).sum()
  )
  assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
  ('real', 'generated', 'sentence'),
  [
    (np.zeros((5, 3)), np.zeros((5, 4)), r'must be \[N,D\]'),
    (np.zeros(5), np.zeros(5), r'must be \[N,D\]'),
    (np.zeros((5, 3)), np.zeros((1, 3)), 'too few'),
    (np.zeros((5, 3)), np.full((5, 3), np.nan), 'not finite'),
  ],
)
def test_sets_that_cannot_be_compared(real, generated, sentence):
  with pytest.raises(ValueError, match=sentence):
    frechet_distance(real, generated)

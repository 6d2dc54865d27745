"""The v-target, the preconditioning against EDM's definitions, and the noise levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax.diffusion import edm


@pytest.mark.parametrize('sigma', [0.01, 1.0, 100.0])
def test_v_error_equals_weighted_denoising_error(sigma):
  """EDM's weighted error of D (equation 8), in float64, is the plain error of v."""
  rng = np.random.default_rng(0)
  x, noise, v = rng.normal(size=(3, 200))

  def weighted(v):
    return (
      (1 + sigma**2)
      / sigma**2
      * np.square(
        (x + sigma * noise) / (1 + sigma**2) - sigma / np.sqrt(1 + sigma**2) * v - x
      )
    )

  ours = jnp.square(v - edm.v_target(jnp.float32(x), jnp.float32(noise), sigma))
  np.testing.assert_allclose(ours, weighted(v), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize('sigma', [0.002, 0.3, 1.0, 40.0, 700.0])
def test_preconditioning(sigma):
  rng = np.random.default_rng(1)
  x, noise = jnp.float32(rng.normal(size=(2, 500)))
  z = x + sigma * noise
  # The network's input has unit variance.
  np.testing.assert_allclose(np.std(edm.c_in(sigma) * z), 1, atol=0.15)
  np.testing.assert_allclose(edm.weight(sigma) * edm.c_out(sigma) ** 2, 1, rtol=1e-6)
  np.testing.assert_allclose(edm.c_noise(sigma), np.log(sigma) / 4, rtol=1e-6)
  np.testing.assert_allclose(
    edm.denoised(z, edm.v_target(x, noise, sigma), sigma), x, atol=3e-4
  )


def test_noise_levels_are_log_normal_and_bounded():
  sigma = np.asarray(edm.draw_sigma(jax.random.key(0), (100_000,)), np.float64)
  assert sigma.min() >= np.float32(0.002) and sigma.max() <= 700
  log = np.log(sigma)
  assert abs(log.mean() - 0.7) < 0.02 and abs(log.std() - 1.6) < 0.02
  video = edm.draw_sigma(jax.random.key(0), (1000,), p_mean=-1.2, p_std=1.2)
  assert abs(float(jnp.log(video).mean()) + 1.2) < 0.15

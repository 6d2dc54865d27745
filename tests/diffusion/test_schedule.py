"""Sigmas, timesteps, Euler steps and guidance against recorded numbers and formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dicetalk_jax.diffusion import edm, guidance, schedule


@pytest.fixture(scope='module')
def golden(goldens):
  return load_file(goldens / 'scheduler/tensors.safetensors')


@pytest.mark.parametrize('steps', [25, 10, 4])
def test_levels(golden, steps):
  sigmas = schedule.karras_sigmas(steps)
  np.testing.assert_array_equal(sigmas, golden[f'steps{steps}/sigmas'])
  np.testing.assert_allclose(
    schedule.timesteps(sigmas), golden[f'steps{steps}/timesteps'], rtol=0, atol=2e-7
  )


def test_trace(golden):
  """Four steps.

  A step rounds numbers of the size of x three times (quotient, product, sum), hence
  the limit of two float32 spacings.
  """
  sigmas = schedule.karras_sigmas(4)
  x = golden['trace/ref_latents'][:, None] + golden['trace/noise'] * sigmas[0]
  np.testing.assert_allclose(x, golden['trace/latents0'], rtol=1e-6)
  for i in range(4):
    x = jnp.asarray(x)
    v = jnp.asarray(golden[f'trace/model_output{i}'])
    np.testing.assert_allclose(
      x * edm.c_in(sigmas[i]), golden[f'trace/scaled_input{i}'], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(
      edm.denoised(x, v, sigmas[i]),
      golden[f'trace/pred_original{i}'],
      rtol=0,
      atol=1e-6,
    )
    ours = schedule.euler_step(x, v, sigmas[i], sigmas[i + 1])
    spacing = np.spacing(np.abs(x).max())
    x = golden[f'trace/prev_sample{i}']
    np.testing.assert_allclose(ours, x, rtol=0, atol=2 * spacing)


def test_last_step_is_the_denoised_sample():
  z, v = jnp.float32(np.random.default_rng(0).normal(size=(2, 50)))
  np.testing.assert_allclose(
    schedule.euler_step(z, v, 0.3, 0.0), edm.denoised(z, v, 0.3), atol=1e-6
  )


def test_guidance():
  v = jnp.float32(np.random.default_rng(0).normal(size=(2, 3, 5)))
  u, m, c = np.moveaxis(np.asarray(v), 1, 0)
  np.testing.assert_allclose(
    guidance.combine(v, 3.0, 6.0, axis=1),
    u + 3 * (m - u) + 6 * (c - m),
    rtol=1e-5,
    atol=1e-5,
  )
  np.testing.assert_allclose(
    guidance.combine(v, 1.0, 1.0, axis=1), c, rtol=1e-5, atol=1e-6
  )
  np.testing.assert_array_equal(guidance.weights((2.0, 4.0), 5), [2, 2.5, 3, 3.5, 4])
  np.testing.assert_array_equal(guidance.weights(3.0, 2), [3, 3])

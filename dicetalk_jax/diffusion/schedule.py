"""The Euler sampler's noise levels and its step (published: EulerDiscreteScheduler
with Karras sigmas).
"""

import jax
import numpy as np

from dicetalk_jax.diffusion import edm


def karras_sigmas(
  steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0
) -> np.ndarray:
  """Falling noise levels with a final zero, EDM (arXiv 2206.00364) equation 5.

  Returns:
    float32 `[steps + 1]`, computed in float64.
  """
  top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
  ramp = np.linspace(0, 1, steps)
  return np.append((top + ramp * (bottom - top)) ** rho, 0).astype(np.float32)


def timesteps(sigmas: np.ndarray) -> np.ndarray:
  """What the time embedding sees at each step: `0.25 ln s`, float32 `[steps]` for
  `[steps + 1]` levels.
  """
  return (0.25 * np.log(sigmas[:-1])).astype(np.float32)


def euler_step(
  z: jax.Array, v: jax.Array, sigma: jax.Array, sigma_next: jax.Array
) -> jax.Array:
  """One Euler step of the probability flow, EDM algorithm 1 without churn; float32.

  Args:
    z: noisy sample at level `sigma`, any shape.
    v: the network's (guided) output for it.
    sigma, sigma_next: scalars; the last step, to level 0, gives the denoised sample.
  """
  slope = (z - edm.denoised(z, v, sigma)) / sigma
  return z + slope * (sigma_next - sigma)

"""Noise levels and steps of the Euler sampler (paper section 4.1).

The reference implementation uses EulerDiscreteScheduler with Karras sigmas. EDM =
Karras et al., arXiv 2206.00364.
"""

from jaxtyping import Array, Float
import numpy as np

from dicetalk_jax.diffusion import edm


def karras_sigmas(
  steps: int, sigma_min: float = 0.002, sigma_max: float = 700.0, rho: float = 7.0
) -> Float[np.ndarray, '{steps}+1']:
  """Computes falling noise levels with a final zero, EDM equation 5.

  Returns:
    float32, computed in float64.
  """
  top = sigma_max ** (1 / rho)
  bottom = sigma_min ** (1 / rho)
  ramp = np.linspace(0, 1, steps)
  falling = (top + ramp * (bottom - top)) ** rho
  return np.append(falling, 0).astype(np.float32)


def timesteps(sigmas: Float[np.ndarray, ' levels']) -> Float[np.ndarray, 'levels-1']:
  """Computes what the time embedding sees at each step, `0.25 ln s`, float32."""
  return np.asarray(0.25 * np.log(sigmas[:-1]), np.float32)


def euler_step(
  z: Float[Array, '*shape'],
  v: Float[Array, '*shape'],
  sigma: Float[Array, ''] | np.float32 | float,
  sigma_next: Float[Array, ''] | np.float32 | float,
) -> Float[Array, '*shape']:
  """Takes one Euler step of the probability flow: the first half of a step of EDM
  algorithm 1, which adds Heun's correction.

  Args:
    z: noisy sample at level `sigma`.
    v: the network's (guided) output for it.
    sigma: noise level of z.
    sigma_next: the level to step to; 0 gives the denoised sample.

  Returns:
    float32.
  """
  slope = (z - edm.denoised(z, v, sigma)) / sigma
  return z + slope * (sigma_next - sigma)

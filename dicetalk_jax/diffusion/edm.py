"""EDM preconditioning with v-prediction and sigma_data = 1, as in Stable Video
Diffusion.

A noisy sample is `z = x + s n` with `n ~ N(0, 1)`; `s` is the noise level (sigma). The
network `F` sees `c_in(s) z` and the number `c_noise(s)`; its denoised estimate is
`D = c_skip(s) z + c_out(s) F`. Everything here is float32: s reaches 700 and the
sampler starts from samples of that size.

Sources: EDM = Karras et al., arXiv 2206.00364; SVD = Blattmann et al., arXiv
2311.15127, appendix D.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

Sigma = Float[Array, '*level'] | np.float32 | float


def c_in(sigma: Sigma) -> Float[Array, '*level']:
  """Input scale, EDM table 1 with sigma_data = 1."""
  return 1 / jnp.sqrt(1 + jnp.square(sigma))


def c_skip(sigma: Sigma) -> Float[Array, '*level']:
  """Share of the noisy sample in the denoised one, EDM table 1."""
  return 1 / (1 + jnp.square(sigma))


def c_out(sigma: Sigma) -> Float[Array, '*level']:
  """Scale of the network's output; negative, because SVD predicts v instead of EDM's
  residual.
  """
  return -sigma / jnp.sqrt(1 + jnp.square(sigma))


def c_noise(sigma: Sigma) -> Float[Array, '*level']:
  """The number that the time embedding sees, EDM table 1."""
  return 0.25 * jnp.log(sigma)


def weight(sigma: Sigma) -> Float[Array, '*level']:
  """Loss weight of the squared error of `D`, EDM section 5; `weight * c_out^2 = 1`."""
  return 1 + 1 / jnp.square(sigma)


def denoised(
  z: Float[Array, '*shape'], v: Float[Array, '*shape'], sigma: Sigma
) -> Float[Array, '*shape']:
  """Denoised estimate `D(z; s)` from the network's output v, EDM equation 7."""
  return c_skip(sigma) * z + c_out(sigma) * v


def v_target(
  x: Float[Array, '*shape'], noise: Float[Array, '*shape'], sigma: Sigma
) -> Float[Array, '*shape']:
  """The output that training asks of the network for `z = x + s n`.

  It is `(n - s x) / sqrt(1 + s^2)`. Plain squared error on it equals EDM's weighted
  error of `D` (equation 8) and never divides by a small s. `sigma` broadcasts
  against x.
  """
  return (noise - sigma * x) * c_in(sigma)


def draw_sigma(
  key: Key[Array, ''],
  shape: tuple[int, ...] = (),
  *,
  p_mean: float = 0.7,
  p_std: float = 1.6,
  sigma_min: float = 0.002,
  sigma_max: float = 700.0,
) -> Float[Array, '...']:
  """Draws training noise levels, float32: `ln s ~ N(p_mean, p_std^2)` (EDM table 1).

  They are clipped to the sampler's range. The default mean and deviation are those
  common for fine-tuning SVD; EDM's own (-1.2, 1.2) leave video too little noise.
  """
  normal = jax.random.normal(key, shape)
  return jnp.clip(jnp.exp(p_mean + p_std * normal), sigma_min, sigma_max)

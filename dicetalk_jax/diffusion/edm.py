"""EDM preconditioning with v-prediction and sigma_data = 1, as Stable Video Diffusion
uses it.

A noisy sample is `z = x + s n` with `n ~ N(0, 1)`; `s` is the noise level (sigma). The
network `F` sees `c_in(s) z` and the number `c_noise(s)`; its denoised estimate is `D =
c_skip(s) z + c_out(s) F`. Everything here is float32: s reaches 700 and the sampler
starts from samples of that size.

Sources: EDM = Karras et al., arXiv 2206.00364; SVD = Blattmann et al., arXiv
2311.15127, appendix D.
"""

import jax
import jax.numpy as jnp


def c_in(sigma: jax.Array) -> jax.Array:
  """Input scale, EDM table 1 with sigma_data = 1."""
  return 1 / jnp.sqrt(1 + jnp.square(sigma))


def c_skip(sigma: jax.Array) -> jax.Array:
  """Share of the noisy sample in the denoised one, EDM table 1."""
  return 1 / (1 + jnp.square(sigma))


def c_out(sigma: jax.Array) -> jax.Array:
  """Scale of the network's output; negative, because SVD predicts v instead of EDM's
  residual.
  """
  return -sigma / jnp.sqrt(1 + jnp.square(sigma))


def c_noise(sigma: jax.Array) -> jax.Array:
  """The number that the time embedding sees, EDM table 1."""
  return 0.25 * jnp.log(sigma)


def weight(sigma: jax.Array) -> jax.Array:
  """Loss weight of the squared error of `D`, EDM section 5; `weight * c_out^2 = 1`."""
  return 1 + 1 / jnp.square(sigma)


def denoised(z: jax.Array, v: jax.Array, sigma: jax.Array) -> jax.Array:
  """`D(z; s)`, EDM equation 7."""
  return c_skip(sigma) * z + c_out(sigma) * v


def v_target(x: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
  """What the network should say for `z = x + s n`: `(n - s x) / sqrt(1 + s^2)`.

  Plain squared error on it equals EDM's weighted error of `D` (equation 8) and never
  divides by a small s. `sigma` broadcasts against `x`.
  """
  return (noise - sigma * x) * c_in(sigma)


def draw_sigma(
  key: jax.Array,
  shape: tuple[int, ...] = (),
  *,
  p_mean: float = 0.7,
  p_std: float = 1.6,
  sigma_min: float = 0.002,
  sigma_max: float = 700.0,
) -> jax.Array:
  """Training noise levels, float32: `ln s ~ N(p_mean, p_std^2)` (EDM table 1), kept
  within the sampler's range.

  The defaults are those common for fine-tuning SVD; EDM's own (-1.2, 1.2) leave video
  too little noise.
  """
  return jnp.clip(
    jnp.exp(p_mean + p_std * jax.random.normal(key, shape)), sigma_min, sigma_max
  )

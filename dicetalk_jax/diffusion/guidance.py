"""Guidance over three branches: nothing, appearance, appearance with audio and emotion.

The mask, its features and the time ids reach every branch. The branches are an axis of
length 3 that the network sees as part of its batch.
"""

import jax
import jax.numpy as jnp
import numpy as np

BRANCHES = 3
HAS_APPEARANCE = np.array([0, 1, 1])  # reference latents and CLIP token
HAS_MOTION = np.array(
  [0, 0, 1]
)  # audio and emotion tokens; the others get the unconditional tokens


def combine(
  v: jax.Array, g_image: jax.Array, g_condition: jax.Array, axis: int = 0
) -> jax.Array:
  """`v_u + g_image (v_m - v_u) + g_condition (v_c - v_m)`; `axis` of length 3
  disappears.
  """
  nothing, appearance, whole = jnp.moveaxis(v, axis, 0)
  return nothing + g_image * (appearance - nothing) + g_condition * (whole - appearance)


def weights(limits: float | tuple[float, float], steps: int) -> np.ndarray:
  """One guidance weight per step: constant, or linearly from the first to the
  second; float32 `[steps]`.
  """
  return np.linspace(*np.broadcast_to(limits, 2), steps, dtype=np.float32)

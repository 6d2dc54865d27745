"""Classifier-free guidance over three branches: nothing, appearance, and appearance
with audio and emotion.

The branches are an axis of length 3 that the network sees as part of its batch. The
face mask, pose guider features and time ids reach every branch.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

BRANCHES = 3
# Which branches see the reference latents and the CLIP token.
HAS_APPEARANCE = np.array([0, 1, 1])
# Which branches see audio and emotion; the others get the unconditional tokens.
HAS_MOTION = np.array([0, 0, 1])


def combine(
  v: Float[Array, '...'],
  g_image: Float[Array, ''] | np.float32 | float,
  g_condition: Float[Array, ''] | np.float32 | float,
  axis: int = 0,
) -> Float[Array, '...']:
  """Computes `v_u + g_image (v_m - v_u) + g_condition (v_c - v_m)`.

  Args:
    v: the network's output for nothing (u), appearance (m) and all conditions (c).
    g_image: guidance weight of appearance.
    g_condition: guidance weight of audio with emotion.
    axis: the axis of the branches; it disappears.
  """
  u, m, c = jnp.moveaxis(v, axis, 0)
  guided: Array = u + g_image * (m - u) + g_condition * (c - m)
  return guided


def weights(
  limits: float | tuple[float, float], steps: int
) -> Float[np.ndarray, '{steps}']:
  """Computes one guidance weight per step, float32.

  Args:
    limits: the weight of all steps, or those of the first and the last step, between
      which it changes linearly.
    steps: number of steps.
  """
  first, last = np.broadcast_to(limits, 2)
  return np.linspace(first, last, steps, dtype=np.float32)

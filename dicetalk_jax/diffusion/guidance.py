"""Classifier-free guidance over three branches: nothing, the image, and the image with
audio and emotion.

The branches are an axis of length 3 that the network sees as part of its batch. "Image"
stands for the two conditions that come from the portrait's pixels: reference latents
and CLIP token. The face mask, pose guider features and time ids (frame rate, amounts of
motion) reach every branch.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

BRANCHES = 3
# Which branches see the reference latents and the CLIP token.
HAS_IMAGE = np.array([0, 1, 1])
# Which branches see audio and emotion; the others get the unconditional tokens.
HAS_AUDIO_EMOTION = np.array([0, 0, 1])


def needed(g_image: float | tuple[float, float]) -> Int[np.ndarray, ' branches']:
  """Which branches must run: with an image weight of 1, the first one cancels out."""
  return np.arange(1 if np.all(np.equal(g_image, 1)) else 0, BRANCHES)


def combine(
  v: Float[Array, '...'],
  g_image: Float[Array, ''] | np.float32 | float,
  g_condition: Float[Array, ''] | np.float32 | float,
  axis: int = 0,
) -> Float[Array, '...']:
  """Computes `none + g_image (image - none) + g_condition (full - image)`.

  Args:
    v: the network's output of the three branches: with none of these conditions, with
      the image only, and with image, audio and emotion (full). Or of the last two.
    g_image: guidance weight of the image; two branches stand for 1.
    g_condition: guidance weight of audio with emotion.
    axis: the axis of the branches; it disappears.
  """
  *none, image, full = jnp.moveaxis(v, axis, 0)
  start = none[0] + g_image * (image - none[0]) if none else image
  guided: Array = start + g_condition * (full - image)
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

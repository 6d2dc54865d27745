"""How much of a device's memory a step of the sampler takes."""

import math
from typing import Any

from dicetalk_jax.diffusion import guidance
from dicetalk_jax.diffusion.sampler import SamplerConfig
from dicetalk_jax.models.unet import UNetConfig

# What a step holds at its largest moment, in numbers per position of the latents and
# channel of the first level. From the program of the published network for an H200, as
# compiled: 3.7 GB for 3 branches of 25 frames of 64x64 latents, 320 channels, bfloat16.
NUMBERS = 19
# Of the memory that is free once the weights are loaded. The rest is for conditions,
# for keys and values, which grow with the clip, and for the frames of other shapes.
SHARE = 0.7


def window_bytes(
  unet: UNetConfig, sampler: SamplerConfig, height: int, width: int, itemsize: int
) -> int:
  """Predicts the memory that one window of a step takes. Not measured.

  Args:
    unet: the network.
    sampler: frames of a window, and guidance.
    height, width: of the latents.
    itemsize: bytes of a number that the network computes with.
  """
  branches = len(guidance.needed(sampler.g_image))
  positions = branches * sampler.frames * height * width
  return positions * unet.block_out_channels[0] * NUMBERS * itemsize


def windows_that_fit(device: Any, bytes_per_window: int) -> int | None:
  """Predicts how many windows of a step fit into the free memory of a device.

  Args:
    device: of JAX, with the weights loaded.
    bytes_per_window: from `window_bytes`.

  Returns:
    At least 1; None if the device does not report its memory, as CPUs do not.
  """
  stats = device.memory_stats() or {}
  if 'bytes_limit' not in stats:
    return None
  free = stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  return max(1, math.floor(SHARE * free / bytes_per_window))

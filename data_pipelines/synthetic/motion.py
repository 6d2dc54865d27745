"""Head motion, blinks and the small gestures that follow the voice.

They do not depend on the identity.
"""

import numpy as np

from dicetalk_jax.data.clip_record import FPS, SAMPLES_PER_FRAME

_HERTZ = (0.23, 0.51, 1.1)
_SWAY = np.array([0.07, 0.035, 0.035])  # yaw, pitch, roll in radians
_DRIFT = np.array([0.012, 0.008])  # image heights
_NOD = 0.05
_BLINK = 0.220  # seconds


def loudness(audio: np.ndarray) -> np.ndarray:
  """Measures the loudness of each frame, relative to the clip's loud syllables.

  Returns:
    [N] in [0, 1], smoothed.
  """
  level = np.sqrt(np.mean(audio.reshape(-1, SAMPLES_PER_FRAME) ** 2, axis=1))
  level = np.convolve(
    np.pad(level, 2, mode='edge'), [0.1, 0.25, 0.3, 0.25, 0.1], mode='valid'
  )
  return np.clip(level / max(np.quantile(level, 0.95), 1e-4), 0, 1)


def head_motion(
  offset: np.ndarray, loud: np.ndarray, amount: float, rng: np.random.Generator
) -> np.ndarray:
  """Makes yaw, pitch, roll (radians) and tx, ty (image heights): float32 [N, 5].

  Args:
    offset: [N, 3] pose of the emotion.
    loud: [N] loudness, which nods the head.
    amount: factor on sway, drift and nod.
    rng: source of the phases.
  """
  time = (np.arange(len(loud)) + 0.5) / FPS
  weights = np.array([0.5, 0.3, 0.2])
  phases = rng.uniform(0, 2 * np.pi, (5, 3, 1))
  waves = np.einsum(
    'k,ckn->nc', weights, np.sin(2 * np.pi * np.array(_HERTZ)[:, None] * time + phases)
  )
  motion = amount * waves * np.concatenate([_SWAY, _DRIFT])
  motion[:, :3] += offset
  motion[:, 1] -= amount * _NOD * (loud - loud.mean())
  return motion.astype(np.float32)


def blinks(frames: int, rng: np.random.Generator) -> np.ndarray:
  """Makes the closure of the lids: float32 [N] in [0, 1].

  Blinks are triangles of 220 ms. The gaps last 0.8 s plus an exponential time.
  """
  time = (np.arange(frames) + 0.5) / FPS
  closed = np.zeros(frames)
  at = rng.exponential(1.2) + 0.3
  while at < time[-1]:
    closed = np.maximum(closed, 1 - abs(time - at) / (0.5 * _BLINK))
    at += _BLINK + 0.8 + rng.exponential(2.2)
  return np.clip(1.25 * closed, 0, 1).astype(np.float32)

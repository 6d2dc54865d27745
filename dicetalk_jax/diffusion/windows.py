"""Overlapping, cyclic windows over a clip whose length is data, not shape.

DICE-Talk samples a clip of N frames as `T = N + frames`: one window of padding frames
separates its end from its start, because windows wrap around. Sonic has no padding, `T
= N`. Each step moves all windows by a growing shift, so that window borders never fall
on the same frames twice in a row.
"""

import jax
import jax.numpy as jnp
import numpy as np


def count(total, frames: int, overlap: int):
  """Windows per step, `ceil(total / (frames - overlap))`; `total` may be an int or
  an array.
  """
  return -(-total // (frames - overlap))


def shifts(steps: int, offset: int, frames: int | None) -> np.ndarray:
  """How far the windows of each step lie before the first step's: 0, offset, 2
  offset, ... modulo `frames` or not.
  """
  shift = np.arange(steps, dtype=np.int32) * offset
  return shift if frames is None else shift % frames


def indices(
  window: jax.Array, shift: jax.Array, total: jax.Array, frames: int, overlap: int
):
  """Frame indices of the numbered windows.

  Args:
    window: int `[W]`, window numbers; those from `count(total)` on do not exist for
      this clip.
    shift: scalar of this step.
    total: scalar T, padding frames included; may be smaller than the array that holds
      the clip.

  Returns:
    int32 `[W, frames]`, all within `[0, total)`, and bool `[W]`: does the window exist?
  """
  start = window * (frames - overlap)
  return (start[:, None] - shift + jnp.arange(frames)) % total, start < total


def accumulate(
  sums: jax.Array,
  counts: jax.Array,
  values: jax.Array,
  index: jax.Array,
  exists: jax.Array,
):
  """Adds windows onto the frames of one clip.

  Args:
    sums: `[T, ...]`.
    counts: `[T]`, how often each frame was visited.
    values: `[W, frames, ...]`.
    index, exists: from `indices`.

  Returns:
    New `sums`, `counts`. A frame that two windows visit (the last one may wrap onto
    early frames) counts twice.
  """
  keep = jnp.broadcast_to(exists[:, None], index.shape)
  values = jnp.where(jnp.expand_dims(keep, range(2, values.ndim)), values, 0)
  return sums.at[index].add(values), counts.at[index].add(keep.astype(counts.dtype))


def average(sums: jax.Array, counts: jax.Array) -> jax.Array:
  """`sums / counts`; frames that nothing visited (beyond the clip) are zero."""
  counts = jnp.expand_dims(counts, range(counts.ndim, sums.ndim))
  return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), 0)

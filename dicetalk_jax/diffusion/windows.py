"""Overlapping, cyclic windows over a clip whose length is data, not shape.

DICE-Talk samples a clip of N frames as `T = N + frames`: one window of padding frames
separates its end from its start, because windows wrap around. Sonic has no padding,
`T = N`. Each step moves all windows by a growing shift (`shifts`), so that window
borders never fall on the same frames twice in a row.
"""

from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Num
import numpy as np

Count = TypeVar('Count', int, Array)


def count(total: Count, frames: int, overlap: int) -> Count:
  """Counts the windows of a step: `ceil(total / (frames - overlap))`."""
  return -(-total // (frames - overlap))


def shifts(steps: int, offset: int, frames: int | None) -> Int[np.ndarray, '{steps}']:
  """Computes how far each step moves the windows: 0, offset, 2 offset, ...

  Args:
    steps: number of steps.
    offset: growth of the shift from one step to the next.
    frames: window length; shifts are taken modulo it. None leaves them as they are.
  """
  shift = np.arange(steps, dtype=np.int32) * offset
  return shift if frames is None else shift % frames


def indices(
  window: Int[Array, ' W'],
  shift: Int[ArrayLike, ''],
  total: Int[ArrayLike, ''],
  frames: int,
  overlap: int,
) -> tuple[Int[Array, 'W {frames}'], Bool[Array, ' W']]:
  """Computes the frame indices of the numbered windows.

  Args:
    window: window numbers; those from `count(total)` on do not exist for this clip.
    shift: of this step, see `shifts`.
    total: T, padding frames included; may be smaller than the array that holds the
      clip.
    frames: window length.
    overlap: frames that neighbouring windows share.

  Returns:
    Frame indices, all within `[0, total)`, and whether the window exists.
  """
  start = window * (frames - overlap)
  return (start[:, None] - shift + jnp.arange(frames)) % total, start < total


def accumulate(
  sums: Num[Array, 'T *shape'],
  counts: Int[Array, ' T'],
  values: Num[Array, 'W frames *shape'],
  index: Int[Array, 'W frames'],
  exists: Bool[Array, ' W'],
) -> tuple[Num[Array, 'T *shape'], Int[Array, ' T']]:
  """Adds windows onto the frames of one clip.

  Args:
    sums: sum of the values of each frame so far.
    counts: how often each frame was visited so far.
    values: the windows to add.
    index, exists: from `indices`.

  Returns:
    New `sums`, `counts`. A frame that two windows visit (the last one may wrap onto
    early frames) counts twice.
  """
  keep = jnp.broadcast_to(exists[:, None], index.shape)
  values = jnp.where(jnp.expand_dims(keep, range(2, values.ndim)), values, 0)
  return sums.at[index].add(values), counts.at[index].add(keep.astype(counts.dtype))


def average(sums: Num[Array, '...'], counts: Int[Array, '...']) -> Float[Array, '...']:
  """Divides `sums / counts`; frames that nothing visited (beyond the clip) are zero.

  Args:
    sums: `[*clips,T,*shape]`, from `accumulate`.
    counts: `[*clips,T]`, likewise.
  """
  counts = jnp.expand_dims(counts, range(counts.ndim, sums.ndim))
  return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), 0)

"""Expression features from files: whatever a face tracker writes, as one row per frame
at 25 per second.

Any width will do: 64 expression coefficients of the Basel model (`coeff[:, 80:144]` of
Deep3DFaceRecon), 50 of FLAME, 52 blendshapes of MediaPipe, 17 action units of OpenFace,
...
"""

import csv
import os
import re

import numpy as np

from dicetalk_jax.data.clip_record import FPS
from dicetalk_jax.errors import DataError

_KEYS = (
  'coeff',
  'coeff_3dmm',
  'expression',
  'exp',
)  # names in .mat and .npz, in this order
_ACTION_UNIT = re.compile(
  r'AU\d+_r'
)  # OpenFace: intensities, beside angles, landmarks and confidence
_SLACK = 3  # frames by which video and features may differ in length


def parse_columns(text: str) -> tuple[int, int]:
  """The flag 'FIRST:END', such as 80:144. Raises ValueError."""
  first, end = map(int, text.split(':'))
  return first, end


def read_expression(
  path: str | os.PathLike, key: str = '', columns: tuple[int, int] | None = None
) -> np.ndarray:
  """Reads one file of features.

  Args:
    path: `.npy`, `.npz`, `.mat` (to version 7), `.txt` (numbers) or `.csv` (with or
      without a line of names; of OpenFace's columns, the intensities of action units).
    key: name of the array in `.mat` and `.npz`; where it is not given, 'coeff',
      'coeff_3dmm', 'expression', 'exp', or the only matrix there is.
    columns: (first, end) of the columns that are used; all by default.

  Returns:
    float32 `[T,D]`.

  Raises:
    DataError: the file is damaged, or holds no such matrix of finite numbers.
  """
  ending = os.path.splitext(path)[1].lower()
  try:
    if ending in ('.npy', '.npz'):
      loaded = np.load(path, allow_pickle=False)
      rows = (
        loaded
        if ending == '.npy'
        else _choose(path, {name: loaded[name] for name in loaded.files}, key)
      )
    elif ending == '.mat':
      import scipy.io

      rows = _choose(path, scipy.io.loadmat(path), key)
    elif ending == '.txt':
      rows = np.loadtxt(path, ndmin=2)
    elif ending == '.csv':
      rows = _read_csv(path)
    else:
      raise DataError(
        f'{path} is of no known kind of expression features; use .npy, .npz, .mat, '
        '.txt or .csv'
      )
    rows = np.asarray(rows, np.float32)
  except DataError:
    raise
  except NotImplementedError as error:
    raise DataError(f'{path} is a MATLAB 7.3 file; save it with -v7') from error
  except Exception as error:  # readers fail on damaged files in every way there is
    raise DataError(
      f'{path} cannot be read as numbers ({error}); save a plain matrix'
    ) from error
  rows = rows.reshape(len(rows), -1) if rows.ndim == 3 and 1 in rows.shape[1:] else rows
  if columns and rows.ndim == 2:
    if columns[1] > rows.shape[1]:
      raise DataError(
        f'{path} has {rows.shape[1]} columns; columns {columns[0]}:{columns[1]} are '
        'asked for'
      )
    rows = rows[:, slice(*columns)]
  if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
    raise DataError(
      f'{path} holds {list(rows.shape)} values, some perhaps not finite; features are '
      'a matrix [T,D]'
    )
  return rows


def _choose(
  path: str | os.PathLike, arrays: dict[str, np.ndarray], key: str
) -> np.ndarray:
  arrays = {name: value for name, value in arrays.items() if not name.startswith('__')}
  for name in [key] if key else _KEYS:
    if name in arrays:
      return arrays[name]
  matrices = [
    value
    for value in arrays.values()
    if value.ndim == 2 and value.dtype.kind in 'fiu' and len(value) > 1
  ]
  if key or len(matrices) != 1:
    raise DataError(
      f'{path} holds {", ".join(arrays) or "nothing"}; say which with --expression_key'
    )
  return matrices[0]


def _read_csv(path: str | os.PathLike) -> np.ndarray:
  with open(path, newline='', encoding='utf-8-sig') as file:
    lines = [
      [cell.strip() for cell in line]
      for line in csv.reader(file)
      if any(cell.strip() for cell in line)
    ]
  try:
    [float(cell) for cell in lines[0]]
    names = []
  except (ValueError, IndexError):
    names, lines = (lines or [[]])[0], lines[1:]
  wanted = [i for i, name in enumerate(names) if _ACTION_UNIT.fullmatch(name)]
  return np.array(
    [[float(line[i]) for i in wanted or range(len(line))] for line in lines]
  )


def resample(rows: np.ndarray, fps: float) -> np.ndarray:
  """Rows `[T,D]` at `fps` -> linearly interpolated at 25 per second, `[round(25 T /
  fps),D]`.
  """
  if fps == FPS:
    return rows
  place = np.minimum(np.arange(round(len(rows) * FPS / fps)) * fps / FPS, len(rows) - 1)
  low = place.astype(int)
  high = np.minimum(low + 1, len(rows) - 1)
  part = np.float32(place - low)[:, None]
  return (1 - part) * rows[low] + part * rows[high]


def fit(rows: np.ndarray, frames: int) -> np.ndarray:
  """Rows of a clip that has `frames` frames: cut, or the last one repeated.

  Raises:
    DataError: they differ by more than 3 frames.
  """
  if abs(len(rows) - frames) > _SLACK or not len(rows):
    raise DataError(
      f'there are {len(rows)} rows of features for {frames} frames at {FPS} per '
      'second; is --expression_fps right?'
    )
  return np.pad(rows[:frames], ((0, max(0, frames - len(rows))), (0, 0)), mode='edge')

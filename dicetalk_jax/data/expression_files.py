"""Expression features from the files of face trackers: one row per frame at 25 fps.

Any width is possible: 64 expression coefficients of the Basel model (`coeff[:, 80:144]`
of Deep3DFaceRecon), 50 of FLAME, 52 blendshapes of MediaPipe, 17 action units of
OpenFace, ...
"""

import io
import os
import re

import numpy as np

from dicetalk_jax import text_files
from dicetalk_jax.data.clip_record import FPS
from dicetalk_jax.errors import DataError

# Names in .mat and .npz, the first that is there.
_KEYS = ('coeff', 'coeff_3dmm', 'expression', 'exp')
# OpenFace's intensities, next to angles, landmarks and confidence.
_ACTION_UNIT = re.compile(r'AU\d+_r')
_SLACK = 3  # frames by which video and features may differ in length


def parse_columns(text: str) -> tuple[int, int]:
  """Parses the flag 'FIRST:END', such as 80:144. Raises ValueError."""
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
  try:
    rows = np.asarray(_read_matrix(path, key), np.float32)
  except DataError:
    raise
  except NotImplementedError as error:
    raise DataError(f'{path} is a MATLAB 7.3 file; save it with -v7') from error
  except Exception as error:  # readers fail on damaged files in every way there is
    raise DataError(
      f'{path} cannot be read as numbers ({error}); save a plain matrix'
    ) from error
  if rows.ndim == 3 and 1 in rows.shape[1:]:
    rows = rows.reshape(len(rows), -1)
  if columns and rows.ndim == 2:
    first, end = columns
    if end > rows.shape[1]:
      raise DataError(
        f'{path} has {rows.shape[1]} columns; columns {first}:{end} are asked for'
      )
    rows = rows[:, first:end]
  if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
    raise DataError(
      f'{path} holds {list(rows.shape)} values, some perhaps not finite; features are '
      'a matrix [T,D]'
    )
  return rows


def _read_matrix(path: str | os.PathLike, key: str) -> np.ndarray:
  """The rows of a file, whatever their type and shape."""
  ending = os.path.splitext(path)[1].lower()
  if ending == '.npy':
    return np.load(path, allow_pickle=False)
  if ending == '.npz':
    with np.load(path, allow_pickle=False) as arrays:
      return _choose(path, dict(arrays), key)
  if ending == '.mat':
    import scipy.io

    return _choose(path, scipy.io.loadmat(path), key)
  if ending == '.txt':
    return np.loadtxt(io.StringIO(text_files.decode(_read_bytes(path))), ndmin=2)
  if ending == '.csv':
    return _read_csv(path)
  raise DataError(
    f'{path} is not a known kind of expression features; use .npy, .npz, .mat, .txt or '
    '.csv'
  )


def _choose(
  path: str | os.PathLike, arrays: dict[str, np.ndarray], key: str
) -> np.ndarray:
  """The array of that key, else of a usual name, else the only matrix."""
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


def _read_bytes(path: str | os.PathLike) -> bytes:
  with open(path, 'rb') as file:
    return file.read()


def _read_csv(path: str | os.PathLike) -> np.ndarray:
  """All columns, or of those with names only the action units if there are any."""
  lines = [*text_files.read_csv(_read_bytes(path))]
  names: list[str] = []
  if lines and not _is_numbers(lines[0]):
    names = lines.pop(0)
  wanted = [i for i, name in enumerate(names) if _ACTION_UNIT.fullmatch(name)]
  return np.array(
    [[float(line[i]) for i in wanted or range(len(line))] for line in lines]
  )


def _is_numbers(cells: list[str]) -> bool:
  try:
    for cell in cells:
      float(cell)
  except ValueError:
    return False
  return True


def resample(rows: np.ndarray, fps: float) -> np.ndarray:
  """Interpolates rows linearly to 25 per second.

  Args:
    rows: `[T,D]`.
    fps: rows per second.

  Returns:
    `[round(25 T / fps),D]`.
  """
  if fps == FPS:
    return rows
  last = len(rows) - 1
  place = np.minimum(np.arange(round(len(rows) * FPS / fps)) * fps / FPS, last)
  low = place.astype(int)
  high = np.minimum(low + 1, last)
  part = (place - low).astype(np.float32)[:, None]
  return (1 - part) * rows[low] + part * rows[high]


def fit(rows: np.ndarray, frames: int) -> np.ndarray:
  """Fits rows to a clip of `frames` frames: cuts them, or repeats the last one.

  Raises:
    DataError: they differ by more than 3 frames.
  """
  if abs(len(rows) - frames) > _SLACK or not len(rows):
    raise DataError(
      f'there are {len(rows)} rows of features for {frames} frames at {FPS} per '
      'second; is --expression_fps right?'
    )
  return np.pad(rows[:frames], ((0, max(0, frames - len(rows))), (0, 0)), mode='edge')

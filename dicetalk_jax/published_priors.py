"""Emotion priors as the reference implementation keeps them.

They are `.npy` files that hold a pickled dict, {'mu': float32 [1,256]}. They are read
without running any code of the pickle (`safe_pickle`). Plain `.npy` arrays are read as
means. Written files are what the reference implementation loads.
"""

from collections.abc import Mapping
import io
import pathlib
import tempfile
from typing import Any, NamedTuple

import numpy as np

from dicetalk_jax import safe_pickle
from dicetalk_jax.bundle import Prior
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.files import atomic_file

MU, SIGMA = 'mu', 'sigma'
EMBEDDER = 'embedder'
MAX_BYTES = 1 << 20  # a prior has 256 numbers


class PriorFile(NamedTuple):
  """A file that was read.

  Attributes:
    prior: mean and deviation, float32 `[d]` each. The published files have no
      deviation: it is 0.
    embedder: fingerprint of the embedder that made it; '' if the file does not name it.
    others: names of what else the file holds, which nothing uses.
  """

  prior: Prior
  embedder: str
  others: list[str]


def read(path: pathlib.Path) -> PriorFile:
  """Reads one prior.

  Raises:
    InputError: the file is missing or damaged.
    WeightsError: it holds something else, or asks to run code, which is not done.
  """
  try:
    if path.stat().st_size > MAX_BYTES:
      raise WeightsError(f'{path} is too large for an emotion prior; get it again')
    content = _content(path.read_bytes())
  except WeightsError:
    raise
  except OSError as error:
    raise InputError(
      f'cannot read {path}: {error.strerror}; check the path and its permissions'
    ) from None
  except safe_pickle.ForbiddenError as error:
    raise WeightsError(
      f'{path} asks to run code ({error}), which was not done; '
      'get a plain file from its authors'
    ) from None
  # Damage, or something else than a prior, shows as almost any exception.
  except Exception:
    raise WeightsError(
      f'{path} is not an emotion prior (an array, or a dict with an array {MU!r}); get '
      'it again'
    ) from None
  mu = _row(content[MU], path)
  sigma = _row(content[SIGMA], path) if SIGMA in content else np.zeros_like(mu)
  if mu.shape != sigma.shape:
    raise WeightsError(f'{path} has a deviation of another size; get it again')
  embedder = content.get(EMBEDDER)
  return PriorFile(
    prior=(mu, sigma),
    embedder=embedder if isinstance(embedder, str) else '',
    others=sorted(content.keys() - {MU, SIGMA, EMBEDDER}),
  )


def _content(file: bytes) -> dict[str, Any]:
  """Reads the entries of the file by name; `mu` and `sigma` are arrays of numbers."""
  stream = io.BytesIO(file)
  version = np.lib.format.read_magic(stream)
  if version == (1, 0):
    _, _, dtype = np.lib.format.read_array_header_1_0(stream)
  else:
    _, _, dtype = np.lib.format.read_array_header_2_0(stream)
  if dtype.hasobject:
    content = {str(name): x for name, x in safe_pickle.load(stream).item().items()}
  else:
    array = np.load(io.BytesIO(file), allow_pickle=False)
    content = {MU: np.asarray(array, np.float32)}
  _check_numbers(content[MU])
  if SIGMA in content:
    _check_numbers(content[SIGMA])
  return content


def _check_numbers(array: Any) -> None:
  is_numbers = isinstance(array, np.ndarray) and array.dtype.kind == 'f'
  if not is_numbers or array.nbytes > MAX_BYTES:
    raise ValueError('not a small array of numbers')


def _row(array: np.ndarray, path: pathlib.Path) -> np.ndarray:
  """The numbers of a mean or deviation, float32 `[d]`."""
  if array.shape not in ((array.size,), (1, array.size)):
    raise WeightsError(
      f'{path} has an array of shape {array.shape}, where a prior is one row of '
      'numbers; get it again'
    )
  row = np.asarray(array, np.float32).reshape(-1)
  if not np.isfinite(row).all():
    raise WeightsError(f'{path} has values that are not finite; get it again')
  return row


def write(path: pathlib.Path, prior: Prior, embedder: str = '') -> None:
  """Writes a file for the reference implementation.

  It loads `numpy.load(path, allow_pickle=True).item()['mu']`, float32 `[1, d]`. A
  deviation, and the fingerprint of the embedder, are written only if there is one; the
  reference implementation ignores them.

  Raises:
    InputError: the place cannot be written to.
  """
  mu, sigma = (np.asarray(x, np.float32).reshape(1, -1) for x in prior)
  content: dict[str, Any] = {MU: mu}
  if sigma.any():
    content[SIGMA] = sigma
  if embedder:
    content[EMBEDDER] = embedder
  with atomic_file(path) as part, part.open('wb') as file:
    np.save(file, np.array(content, object), allow_pickle=True)


def make_folder(folder: pathlib.Path) -> None:
  """Makes a folder for `write_all`; call it before work whose result goes there.

  Raises:
    InputError: it cannot be made, or not be written to.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise InputError(
      f'cannot write into {folder}: {error.strerror}; choose another folder'
    ) from error


def write_all(folder: pathlib.Path, priors: Mapping[str, tuple[Prior, str]]) -> None:
  """Writes one file for each emotion, `EMOTION.npy`; see `write` and `make_folder`.

  Args:
    folder: made if missing.
    priors: emotion -> (prior, fingerprint of its embedder or '').
  """
  make_folder(folder)
  for emotion, (prior, embedder) in priors.items():
    write(folder / f'{emotion}.npy', prior, embedder)

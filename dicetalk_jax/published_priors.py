"""Emotion priors as the original program keeps them: `.npy` files that hold a pickled
dict, {'mu': float32 [1,256]}.

They are read without executing the pickle: what it calls is replaced by records of
ours, only plain arrays come out. Plain `.npy` arrays are read as means. Written files
are what the original program loads.
"""

from collections.abc import Mapping
import io
import pathlib
import pickle
import tempfile
from typing import Any, NamedTuple

import numpy as np

from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.files import atomic_file

Prior = tuple[np.ndarray, np.ndarray]

MU, SIGMA = 'mu', 'sigma'
EMBEDDER = 'embedder'
MAX_BYTES = 1 << 20  # a prior has 256 numbers
TYPES = ('f2', 'f4', 'f8')


class PriorFile(NamedTuple):
  """A file that was read.

  Attributes:
    prior: mean and deviation, float32 `[d]` each; deviation 0 where the file has none:
      the published ones.
    embedder: fingerprint of the embedder that made it; '' where the file does not tell.
    others: names of what else the file holds, which nothing uses.
  """

  prior: Prior
  embedder: str
  others: list[str]


class _Forbidden(Exception):
  """A pickle wants something else than arrays."""


class _Type:
  """Record of a `numpy.dtype`."""

  def __init__(self, kind: str, *_):
    self.kind, self.order = kind, '<'

  def __setstate__(self, state):
    self.order = state[1]


class _Array:
  """Record of a `numpy.ndarray`."""

  def __setstate__(self, state):
    _, self.shape, self.type, self.fortran, self.content = state

  def numbers(self) -> np.ndarray:
    """The array, if it holds floating point numbers."""
    if self.type.kind not in TYPES or not isinstance(self.content, bytes):
      raise ValueError('an array that holds no floating point numbers')
    dtype = np.dtype(self.type.kind).newbyteorder(
      '<' if self.type.order == '|' else self.type.order
    )
    return np.frombuffer(self.content, dtype).reshape(
      self.shape, order='F' if self.fortran else 'C'
    )


def _reconstruct(*_) -> _Array:
  return _Array()


def _encode(text: str, encoding: str) -> bytes:
  """How old protocols spell bytes."""
  if encoding != 'latin1':
    raise ValueError(f'bytes encoded as {encoding}')
  return text.encode('latin1')


_KNOWN = {
  **{
    (f'numpy.{core}.multiarray', '_reconstruct'): _reconstruct
    for core in ('core', '_core')
  },
  ('numpy', 'ndarray'): _Array,
  ('numpy', 'dtype'): _Type,
  ('_codecs', 'encode'): _encode,
}


class _ArraysOnly(pickle.Unpickler):
  """Knows arrays and nothing else."""

  def find_class(self, module: str, name: str):
    if (module, name) not in _KNOWN:
      raise _Forbidden(f'{module}.{name}')
    return _KNOWN[module, name]

  def persistent_load(self, pid):
    raise ValueError('a persistent id')


def read(path: pathlib.Path) -> PriorFile:
  """Reads one prior.

  Raises:
    InputError: the file is missing or damaged.
    WeightsError: it holds something else, or asks to run code, which is not done.
  """
  try:
    if path.stat().st_size > MAX_BYTES:
      raise WeightsError(f'{path} is too large for an emotion prior; get it again')
    content = _content(io.BytesIO(path.read_bytes()))
  except WeightsError:
    raise
  except OSError as error:
    raise InputError(
      f'cannot read {path}: {error.strerror}; check the path and its permissions'
    ) from None
  except _Forbidden as error:
    raise WeightsError(
      f'{path} asks to run code ({error}), which was not done; '
      'get a plain file from its authors'
    ) from None
  # Damage, or something else than a prior, shows as almost any exception.
  except Exception:
    raise WeightsError(
      f"{path} is no emotion prior (an array, or a dict with an array '{MU}'); get it "
      'again'
    ) from None
  if (shape := content[MU].shape) not in ((content[MU].size,), (1, content[MU].size)):
    raise WeightsError(
      f'{path} has an array of shape {shape}, where a prior is one row of numbers; get '
      'it again'
    )
  mu = np.float32(content[MU]).reshape(-1)
  sigma = (
    np.float32(content[SIGMA]).reshape(-1) if SIGMA in content else np.zeros_like(mu)
  )
  if mu.shape != sigma.shape or not (
    np.isfinite(mu).all() and np.isfinite(sigma).all()
  ):
    raise WeightsError(
      f'{path} has values that are not finite, or a deviation of another size; get it '
      'again'
    )
  embedder = content.get(EMBEDDER)
  return PriorFile(
    prior=(mu, sigma),
    embedder=embedder if isinstance(embedder, str) else '',
    others=sorted(content.keys() - {MU, SIGMA, EMBEDDER}),
  )


def _content(file: io.BytesIO) -> dict[str, np.ndarray | str | None]:
  """The content of the file by name: numbers and text; None for all else."""
  version = np.lib.format.read_magic(file)
  reader = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }[version]
  shape, _, dtype = reader(file)
  if not dtype.hasobject:
    file.seek(0)
    return {MU: np.float32(np.load(file, allow_pickle=False))}
  whole = _ArraysOnly(file).load()
  if (
    (shape, whole.shape) != ((), ())
    or whole.type.kind != 'O8'
    or len(whole.content) != 1
  ):
    raise ValueError('an object array that holds no dict')
  content = {}
  for name, value in dict(whole.content[0]).items():
    if name in (MU, SIGMA):
      content[str(name)] = value.numbers()
    else:
      content[str(name)] = value if isinstance(value, str) else None
  return {MU: content.pop(MU)} | content


def write(path: pathlib.Path, prior: Prior, embedder: str = '') -> None:
  """The file for the original program: `numpy.load(path,
  allow_pickle=True).item()['mu']`; float32 `[1,d]`.

  A deviation, and the fingerprint of the embedder, are written only if there is one;
  the original program ignores them.

  Raises:
    InputError: the place cannot be written to.
  """
  mu, sigma = (np.float32(x).reshape(1, -1) for x in prior)
  content: dict[str, Any] = {MU: mu}
  if sigma.any():
    content[SIGMA] = sigma
  if embedder:
    content[EMBEDDER] = embedder
  with atomic_file(path) as part, part.open('wb') as file:
    np.save(file, np.array(content, object), allow_pickle=True)


def make_folder(folder: pathlib.Path) -> None:
  """Makes the folder for `write_all` where it is missing; call it before work whose
  result goes there.

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

"""Reads published weight files without executing pickles.

Tensors stay in their file, mapped into memory, until they are used.
"""

from collections.abc import Iterable, Mapping
import hashlib
import json
import os
import pathlib
import re
from typing import Any, NamedTuple
import warnings
import zipfile

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
import torch

from dicetalk_jax import orbax_paths
from dicetalk_jax.errors import InputError, WeightsError

StateDict = dict[str, torch.Tensor]


class Weights(NamedTuple):
  """The content of a weight file, and what a user should know about reading it."""

  tensors: StateDict
  notes: tuple[str, ...] = ()


PICKLED = ('.pth', '.pt', '.bin', '.pkl', '.ckpt')
SUFFIXES = ('.safetensors', *PICKLED)
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
# Where training programs put the state dict of a checkpoint. Averages come first, since
# they are what is meant for use.
ENTRIES = (
  'params_ema',
  'ema_state_dict',
  'ema',
  'state_dict',
  'model_state_dict',
  'model',
  'module',
  'params',
  'net',
)
INDEX = re.compile(r'\.index(\.\w+)?\.json$')

# Where diffusers and transformers keep the weights of a module, full precision first.
_STEMS = ('diffusion_pytorch_model', 'model', 'pytorch_model')
_NAMES = (
  '{}.safetensors',
  '{}.safetensors.index.json',
  '{}.fp16.safetensors',
  '{}.safetensors.index.fp16.json',
  '{}.fp16.safetensors.index.json',
  '{}.bin',
  '{}.bin.index.json',
)


def weights_in(folder: pathlib.Path) -> pathlib.Path:
  """Finds the weights of a diffusers or transformers module: a file or an index.

  Raises:
    InputError: the folder has neither.
  """
  candidates = [folder / name.format(stem) for name in _NAMES for stem in _STEMS]
  for path in candidates:
    if path.is_file():
      return path
  raise InputError(
    f'{folder} has no weights ({candidates[0].name} or the like); download all of it'
  )


def files_of(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
  """Lists the weight files of a path: the file itself, or the shards of an index.

  Raises:
    InputError: the index is damaged or names files outside its folder.
  """
  if not INDEX.search(path.name):
    return (path,)
  try:
    names = sorted(set(read_json(path)['weight_map'].values()))
    inside = all(pathlib.PurePath(name).name == name for name in names)
  except (KeyError, AttributeError, TypeError):
    inside = False
  if not inside:
    raise InputError(
      f'{path} is not an index of weight files in its folder; download it again'
    )
  return tuple(path.parent / name for name in names)


def load(path: pathlib.Path) -> StateDict:
  """Reads the state dict of a file or of an index of shards; see `read`."""
  return read(path).tensors


def read(path: pathlib.Path) -> Weights:
  """Reads the weights of a file or of an index of shards.

  Tensors are mapped into memory, so each is read from disk only when it is used. The
  content decides the format, not the name. A checkpoint may hold the state dict one
  level down.

  Raises:
    InputError: a file is missing, damaged, or not a weight file.
    WeightsError: a file holds other things than tensors.
  """
  state: StateDict = {}
  notes: list[str] = []
  for file in files_of(path):
    weights = _read_file(file)
    state |= weights.tensors
    notes += weights.notes
  return Weights(state, tuple(notes))


def _read_file(path: pathlib.Path) -> Weights:
  if path.suffix not in SUFFIXES:
    raise InputError(
      f'{path} is not a weight file; give one that ends in {", ".join(SUFFIXES)}'
    )
  try:
    with path.open('rb') as file:
      start = file.read(9)
  except OSError as error:
    raise InputError(
      f'cannot read {path}: {error.strerror}; check the path and its permissions'
    ) from None
  is_safetensors = path.suffix == '.safetensors' and not _is_pickled(start)
  if is_safetensors or _is_safetensors(start):
    weights = Weights(_load_safetensors(path))
  else:
    weights = _load_pickled(path)
  bad = [
    key
    for key, x in weights.tensors.items()
    if x.layout != torch.strided or x.is_quantized or x.is_complex()
  ]
  if bad:
    raise WeightsError(
      f'{path} holds sparse, quantised or complex tensors ({", ".join(bad[:3])}); '
      'only plain ones can be converted'
    )
  return weights


def _is_safetensors(start: bytes) -> bool:
  """Whether a file begins with the size of a header, and the JSON of that header."""
  size = int.from_bytes(start[:8], 'little')
  return start[8:9] == b'{' and size <= MAX_HEADER


def _is_pickled(start: bytes) -> bool:
  """Whether a file begins as an archive of PyTorch, or as a bare pickle."""
  return start.startswith((b'PK\x03\x04', b'\x80'))


def _load_safetensors(path: pathlib.Path) -> StateDict:
  try:
    # The name must be UTF-8.
    with safe_open(orbax_paths.plain(path.absolute()), 'pt') as file:
      return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
  except (OSError, SafetensorError) as error:
    raise InputError(
      f'{path} cannot be read as safetensors ({error}); download it again'
    ) from None


def _without_ending(path: pathlib.Path) -> str:
  """The file under a name that PyTorch reads: it takes `.safetensors` at its word."""
  whole = os.fspath(path.absolute())
  if path.suffix == '.safetensors':
    return orbax_paths.link(whole)
  return os.fspath(orbax_paths.plain(whole))


def _load_pickled(path: pathlib.Path) -> Weights:
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # about old protocols
      content = torch.load(
        _without_ending(path),
        map_location='cpu',
        weights_only=True,
        mmap=zipfile.is_zipfile(path),
      )
  # PyTorch raises almost any exception for damaged files.
  except Exception as error:
    if forbidden := re.search(r'GLOBAL ([\w.]+)', str(error)):
      raise WeightsError(
        f'{path} asks to run code ({forbidden[1]}), which was not done; '
        'get a file of plain tensors from its authors'
      ) from None
    raise InputError(
      f'{path} cannot be read as PyTorch weights; download it again'
    ) from None
  notes = []
  if not _is_state_dict(content):
    entry = _entry(content, path)
    content = content[entry]
    notes.append(f'{path.name}: read from its entry {entry!r}')
  return Weights({key: x.detach() for key, x in content.items()}, tuple(notes))


def _is_state_dict(content: Any) -> bool:
  return isinstance(content, Mapping) and all(
    isinstance(key, str) and isinstance(x, torch.Tensor) for key, x in content.items()
  )


def _entry(content: Any, path: pathlib.Path) -> str:
  """Names the entry of a checkpoint that holds the state dict.

  Raises:
    WeightsError: there is none, or nobody can say which of several it is.
  """
  found = []
  if isinstance(content, Mapping):
    found = [key for key, value in content.items() if value and _is_state_dict(value)]
  known = [name for name in ENTRIES if name in found]
  if known:
    return known[0]
  if not found:
    raise WeightsError(
      f'{path} is not a state dict (tensors by name); use the published file'
    )
  if len(found) > 1:
    raise WeightsError(
      f'{path} holds several state dicts ({", ".join(map(str, found))}); save the one '
      'of the model alone'
    )
  return found[0]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
  """Gives an array on the same memory."""
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
  return tensor.numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
  """Gives a tensor on the same memory; the inverse of `to_numpy`."""
  if array.dtype == jnp.bfloat16:
    return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
  return torch.from_numpy(array)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a configuration file.

  Raises:
    InputError: the file is missing or damaged.
  """
  try:
    content = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise InputError(f'{path} does not exist; download the whole folder') from None
  except (OSError, ValueError) as error:
    raise InputError(
      f'{path} cannot be read as JSON ({error}); download it again'
    ) from None
  if not isinstance(content, dict):
    raise InputError(f'{path} is not a configuration; download it again')
  return content


def sha256(files: Iterable[pathlib.Path]) -> dict[str, str]:
  """Computes digests, by folder and file name."""
  digests = {}
  for path in files:
    name = f'{path.absolute().parent.name}/{path.name}'
    with path.open('rb') as file:
      digests[name] = hashlib.file_digest(file, 'sha256').hexdigest()
  return digests

"""Reads published weight files without executing pickles.

Tensors stay in their file, mapped into memory, until they are used.
"""

from collections.abc import Iterable, Mapping
import hashlib
import json
import pathlib
import re
from typing import Any
import warnings
import zipfile

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
import torch

from dicetalk_jax.errors import InputError, WeightsError

StateDict = dict[str, torch.Tensor]

PICKLED = ('.pth', '.pt', '.bin', '.pkl', '.ckpt')
SUFFIXES = ('.safetensors', *PICKLED)
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
  """Reads the state dict of a file or of an index of shards.

  Tensors are mapped into memory, so each is read from disk only when it is used.

  Raises:
    InputError: a file is missing, damaged, or not a weight file.
    WeightsError: a file holds other things than tensors.
  """
  state: StateDict = {}
  for file in files_of(path):
    state |= _load_file(file)
  return state


def _load_file(path: pathlib.Path) -> StateDict:
  if path.suffix not in SUFFIXES:
    raise InputError(
      f'{path} is not a weight file; give one that ends in {", ".join(SUFFIXES)}'
    )
  try:
    with path.open('rb'):
      pass
  except OSError as error:
    raise InputError(
      f'cannot read {path}: {error.strerror}; check the path and its permissions'
    ) from None
  if path.suffix == '.safetensors':
    state = _load_safetensors(path)
  else:
    state = _load_pickled(path)
  bad = [
    key
    for key, x in state.items()
    if x.layout != torch.strided or x.is_quantized or x.is_complex()
  ]
  if bad:
    raise WeightsError(
      f'{path} holds sparse, quantised or complex tensors ({", ".join(bad[:3])}); '
      'only plain ones can be converted'
    )
  return state


def _load_safetensors(path: pathlib.Path) -> StateDict:
  try:
    with safe_open(path, 'pt') as file:
      return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
  except (OSError, SafetensorError) as error:
    raise InputError(
      f'{path} cannot be read as safetensors ({error}); download it again'
    ) from None


def _load_pickled(path: pathlib.Path) -> StateDict:
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # about old protocols
      content = torch.load(
        path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path)
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
  plain = isinstance(content, Mapping) and all(
    isinstance(key, str) and isinstance(x, torch.Tensor) for key, x in content.items()
  )
  if not plain:
    raise WeightsError(
      f'{path} is not a state dict (tensors by name); use the published file'
    )
  return {key: x.detach() for key, x in content.items()}


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

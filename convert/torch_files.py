"""Published weight files as state dicts whose tensors stay in the file until they
are used; no pickle is executed.
"""

from collections.abc import Iterable, Mapping
import functools
import hashlib
import json
import operator
import pathlib
import re
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
  """The file, or index of shards, that holds the weights of a diffusers or transformers
  module.

  Raises:
    InputError: there is none.
  """
  found = [
    path
    for name in _NAMES
    for stem in _STEMS
    if (path := folder / name.format(stem)).is_file()
  ]
  if not found:
    raise InputError(
      f'{folder} has no weights ({_NAMES[0].format(_STEMS[0])} or the like); download '
      'it whole'
    )
  return found[0]


def files_of(path: pathlib.Path) -> tuple[pathlib.Path, ...]:
  """The weight files behind a path: itself, or the shards of an index.

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
      f'{path} is no index of weight files in its folder; download it again'
    )
  return tuple(path.parent / name for name in names)


def load(path: pathlib.Path) -> StateDict:
  """The state dict of a file or of an index of shards.

  Tensors are mapped: reading one reads it from disk.

  Raises:
    InputError: a file is missing, damaged, or no weight file.
    WeightsError: a file holds other things than tensors.
  """
  parts = [_load_file(file) for file in files_of(path)]
  return functools.reduce(operator.or_, parts)


def _load_file(path: pathlib.Path) -> StateDict:
  if path.suffix not in SUFFIXES:
    raise InputError(f'{path} is no weight file; those end in {", ".join(SUFFIXES)}')
  try:
    with path.open('rb'):
      pass
  except OSError as error:
    raise InputError(
      f'cannot read {path}: {error.strerror}; check the path and its permissions'
    ) from None
  state = (
    _load_safetensors(path) if path.suffix == '.safetensors' else _load_pickled(path)
  )
  if bad := [
    key
    for key, x in state.items()
    if x.layout != torch.strided or x.is_quantized or x.is_complex()
  ]:
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
  # Damage shows as almost any exception.
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
      f'{path} is no state dict (tensors by name); get the published file'
    )
  return {key: x.detach() for key, x in content.items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
  """The same memory as an array."""
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.uint16).numpy().view(jnp.bfloat16)
  return tensor.numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
  """The same memory as a tensor; the inverse of `to_numpy`."""
  if array.dtype == jnp.bfloat16:
    return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
  return torch.from_numpy(array)


def read_json(path: pathlib.Path) -> dict:
  """A configuration file.

  Raises:
    InputError: missing or damaged.
  """
  try:
    content = json.loads(path.read_text())
  except FileNotFoundError:
    raise InputError(f'{path} does not exist; download the folder whole') from None
  except (OSError, ValueError) as error:
    raise InputError(
      f'{path} cannot be read as JSON ({error}); download it again'
    ) from None
  if not isinstance(content, dict):
    raise InputError(f'{path} is no configuration; download it again')
  return content


def sha256(files: Iterable[pathlib.Path]) -> dict[str, str]:
  """Digests by folder and file name."""
  out = {}
  for path in files:
    with path.open('rb') as file:
      out[f'{path.absolute().parent.name}/{path.name}'] = hashlib.file_digest(
        file, 'sha256'
      ).hexdigest()
  return out

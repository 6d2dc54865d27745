"""Reads the tensors of a TorchScript file, without PyTorch's loader and without running
any of the code in it.

Such a file is a zip archive: pickles name the tensors by attribute, and their values
lie beside, raw. Whatever else the pickles ask for is replaced by objects that do
nothing, or refused.
"""

from collections.abc import Iterator
import io
import math
import pathlib
import pickle
from typing import Any
import zipfile

import torch

from convert.torch_files import StateDict
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.safe_pickle import ForbiddenError

MAX_PICKLE = 1 << 26  # bytes; that of a network has a few hundred kilobytes

_TYPES = {
  'DoubleStorage': torch.float64,
  'FloatStorage': torch.float32,
  'HalfStorage': torch.float16,
  'BFloat16Storage': torch.bfloat16,
  'LongStorage': torch.int64,
  'IntStorage': torch.int32,
  'ShortStorage': torch.int16,
  'CharStorage': torch.int8,
  'ByteStorage': torch.uint8,
  'BoolStorage': torch.bool,
}


class _Object:
  """Stands in for a module: it has attributes, and does nothing."""

  def __init__(self, *_: Any):
    self.state: Any = {}

  def __setstate__(self, state: Any) -> None:
    self.state = state


def _tensor(storage: torch.Tensor, offset: int, shape: Any, stride: Any, *_) -> Any:
  """Stands in for PyTorch's function of the same arguments."""
  reach = sum((n - 1) * step for n, step in zip(shape, stride)) + offset + 1
  negative = offset < 0 or min([0, *shape, *stride]) < 0
  if negative or (math.prod(shape) and reach > len(storage)):
    raise ValueError('a tensor leaves its storage')
  return storage.as_strided(tuple(shape), tuple(stride), offset)


def _as_it_is(value: Any, *_: Any) -> Any:
  return value


# What else a pickle may name, and what it gets.
_STAND_INS = {
  ('torch._utils', '_rebuild_tensor_v2'): _tensor,
  ('torch._utils', '_rebuild_parameter'): _as_it_is,
  ('torch.jit._pickle', 'build_intlist'): _as_it_is,
  ('torch.jit._pickle', 'build_doublelist'): _as_it_is,
  ('torch.jit._pickle', 'build_boollist'): _as_it_is,
  ('torch.jit._pickle', 'build_tensorlist'): _as_it_is,
  ('torch.jit._pickle', 'restore_type_tag'): _as_it_is,
  ('collections', 'OrderedDict'): dict,
}


class _Unpickler(pickle.Unpickler):
  """Knows the stand-ins, and reads the values of tensors."""

  def __init__(self, content: bytes, archive: zipfile.ZipFile, folder: str):
    super().__init__(io.BytesIO(content))
    self._archive = archive
    self._folder = folder

  def find_class(self, module: str, name: str) -> Any:
    if module.split('.')[0] == '__torch__':
      return _Object
    if module == 'torch' and name in _TYPES:
      return name
    if (module, name) in _STAND_INS:
      return _STAND_INS[module, name]
    raise ForbiddenError(f'{module}.{name}')

  def persistent_load(self, pid: Any) -> torch.Tensor:
    _, kind, key, _, _ = pid
    content = bytearray(self._archive.read(f'{self._folder}/{key}'))
    if not content:
      return torch.empty(0, dtype=_TYPES[kind])
    return torch.frombuffer(content, dtype=_TYPES[kind])


def is_torchscript(path: pathlib.Path) -> bool:
  """Whether a file is a zip archive with code, as `torch.jit.save` writes it."""
  if not zipfile.is_zipfile(path):
    return False
  with zipfile.ZipFile(path) as archive:
    return any(name.endswith('/constants.pkl') for name in archive.namelist())


def load(path: pathlib.Path) -> StateDict:
  """Reads all tensors.

  Args:
    path: a file for which `is_torchscript` is true.

  Returns:
    Tensors by the names of their attributes, joined by dots, in the order of the file;
    then the constants, as `constants.0` and so on.

  Raises:
    InputError: the file is damaged.
    WeightsError: it asks for something else than tensors; nothing was called.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      root = next(
        name.removesuffix('/constants.pkl')
        for name in archive.namelist()
        if name.endswith('/constants.pkl')
      )
      found: StateDict = {}
      for stem, prefix in (('data', ''), ('constants', 'constants.')):
        file = f'{root}/{stem}.pkl'
        if archive.getinfo(file).file_size > MAX_PICKLE:
          raise ValueError('a pickle is too large')
        content = _Unpickler(archive.read(file), archive, f'{root}/{stem}').load()
        found |= {prefix + name: x for name, x in _tensors(content)}
      return found
  except ForbiddenError as error:
    raise WeightsError(
      f'{path} asks to run code ({error}), which was not done; get a file of plain '
      'tensors from its authors'
    ) from None
  # Damaged archives and pickles raise almost anything.
  except Exception as error:
    raise InputError(
      f'{path} cannot be read as TorchScript ({error}); download it again'
    ) from None


def _tensors(value: Any, name: str = '') -> Iterator[tuple[str, torch.Tensor]]:
  """Yields the tensors in attributes, dicts and sequences, with their dotted names."""
  if isinstance(value, torch.Tensor):
    yield name, value
    return
  if isinstance(value, _Object):
    value = value.state
  items: Any = ()
  if isinstance(value, dict):
    items = value.items()
  elif isinstance(value, list | tuple):
    items = enumerate(value)
  for key, item in items:
    yield from _tensors(item, f'{name}.{key}'.removeprefix('.'))

"""A recorded run of the reference implementation, from `tools/dump_reference.py`."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from convert.torch_files import read_json
from convert.verify.golden import Tensors
from dicetalk_jax.errors import InputError

FORMAT = 1
TENSORS = 'tensors.safetensors'
SETTINGS = 'settings.json'
NUMBERS = (
  'num_steps',
  'steps_run',
  'frames',
  'overlap',
  'shift',
  'length',
  'decode_chunk',
  'g_image',
  'g_condition',
)


@dataclasses.dataclass(frozen=True)
class Dump:
  """A recorded run.

  Attributes:
    settings: what the run was asked for; `NUMBERS` are always there.
    tensors: by name, in PyTorch's layouts and in the types of the run.
  """

  settings: dict[str, Any]
  tensors: Tensors

  @classmethod
  def read(cls, folder: pathlib.Path) -> 'Dump':
    """Reads a dump.

    Raises:
      InputError: it is not a dump, is damaged, or has another format.
    """
    if not (folder / SETTINGS).is_file():
      raise InputError(
        f'{folder} has no {SETTINGS}, so it is not a whole dump; make one with '
        'tools/dump_reference.py'
      )
    settings = read_json(folder / SETTINGS)
    if settings.get('format') != FORMAT:
      raise InputError(
        f'{folder} has the format {settings.get("format")}, but only {FORMAT} is known '
        'here; use the tools/dump_reference.py of this version'
      )
    lacking = [name for name in NUMBERS if name not in settings]
    if lacking:
      raise InputError(
        f'{folder / SETTINGS} lacks {", ".join(lacking)}; make the dump again'
      )
    return cls(settings, Tensors(folder / TENSORS))

  def __getitem__(self, name: str) -> np.ndarray:
    """A tensor, in float32."""
    return self.tensors[name].astype(np.float32)

  def __contains__(self, name: str) -> bool:
    return name in self.tensors

  def is_half(self, name: str) -> bool:
    """Whether the run computed a tensor in 16 bits."""
    return self.tensors[name].dtype.itemsize == 2

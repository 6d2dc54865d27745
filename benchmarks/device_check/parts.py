"""The parts of the check: their names, their code, how long they may take."""

from collections.abc import Callable, Mapping
import importlib
import pathlib
from types import MappingProxyType
from typing import Any, NamedTuple

from dicetalk_jax.errors import ConfigError

Result = dict[str, Any]


class Context(NamedTuple):
  """Input of a part.

  Attributes:
    out: the folder of results; a part may read those of others.
    reduced: run at sizes for a laptop.
    save: keeps what is known so far, in case the part does not reach its end.
  """

  out: pathlib.Path
  reduced: bool
  save: Callable[[Result], None]


class Part(NamedTuple):
  """One part.

  Attributes:
    function: `module:function` in this package; from a `Context` to a JSON object,
      whose `summary` is one line for the table.
    minutes: that it may take at full size on a GPU.
    description: one line.
    quick: compiles much and computes little: not optimised at reduced size.
    environment: variables of its process.
  """

  function: str
  minutes: float
  description: str
  quick: bool = False
  environment: Mapping[str, str] = MappingProxyType({})

  def load(self) -> Callable[[Context], Result]:
    """Imports the function, and only then what it needs."""
    module_name, function_name = self.function.split(':')
    module = importlib.import_module(f'{__package__}.{module_name}')
    return getattr(module, function_name)


PARTS = {
  'device': Part(
    'device:measure_device', 1, 'versions, products and copies of this device'
  ),
  'goldens': Part(
    'goldens:check_goldens', 4, 'every module against reference outputs', quick=True
  ),
  'denoise': Part('networks:denoise', 3, 'one denoising step of the UNet'),
  'decode': Part('networks:decode', 2, 'one chunk of frames through the decoder'),
  'train': Part('train:train_step', 4, 'one training step', quick=True),
  'torch': Part(
    'torch_step:compare_with_torch',
    4,
    'the denoising step in PyTorch, in turn with ours',
    # PyTorch needs room on the same device.
    environment={'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
  ),
  'tiny': Part(
    'tiny:train_tiny_model',
    3,
    'ten steps of a small model through the loop',
    quick=True,
  ),
}


def choose(names: str) -> list[str]:
  """Reads `--parts`; the order is that of `PARTS`.

  Raises:
    ConfigError: a name is unknown, or there is none.
  """
  chosen = [name.strip() for name in names.split(',') if name.strip()]
  if not chosen:
    raise ConfigError(f'--parts is empty; choose from {",".join(PARTS)}')
  for name in chosen:
    if name not in PARTS:
      raise ConfigError(f'part {name!r} is unknown; choose from {",".join(PARTS)}')
  return [name for name in PARTS if name in chosen]

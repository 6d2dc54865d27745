"""The parts of the check: their names, their code, how long they may take."""

from collections.abc import Callable
import importlib
import pathlib
from typing import Any, NamedTuple

from dicetalk_jax.errors import ConfigError


class Unavailable(Exception):
  """A part cannot run here; the message is one sentence."""


class Context(NamedTuple):
  """Input of a part.

  Attributes:
    out: the folder of results; a part may read those of others.
    reduced: run at sizes for a laptop.
    save: keeps what is known so far, should the part not reach its end.
  """

  out: pathlib.Path
  reduced: bool
  save: Callable[[dict[str, Any]], None]


class Part(NamedTuple):
  """One part.

  Attributes:
    function: `module:function` in this package; from a `Context` to a JSON object,
      whose `summary` is one line for the table.
    minutes: what it may take at full size on a GPU.
    says: what it does.
    quick: compiles much and computes little: not optimised at reduced size.
    environment: variables of its process.
  """

  function: str
  minutes: float
  says: str
  quick: bool = False
  environment: dict[str, str] = {}

  def load(self) -> Callable[[Context], dict[str, Any]]:
    """Imports the function, and only then what it needs."""
    module, name = self.function.split(':')
    return getattr(importlib.import_module(f'{__package__}.{module}'), name)


# PyTorch needs room on the same device.
SHARED = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}

PARTS = {
  'device': Part('device:run', 1, 'versions, products and copies of this device'),
  'goldens': Part(
    'goldens:run', 4, 'every module against reference outputs', quick=True
  ),
  'denoise': Part('networks:denoise', 3, 'one denoising step of the UNet'),
  'decode': Part('networks:decode', 2, 'one chunk of frames through the decoder'),
  'train': Part('train:run', 4, 'one training step', quick=True),
  'torch': Part(
    'torch_step:run',
    4,
    'the denoising step in PyTorch, in turn with ours',
    environment=SHARED,
  ),
  'tiny': Part(
    'tiny:run', 3, 'ten steps of a small model through the loop', quick=True
  ),
}


def chosen(names: str) -> list[str]:
  """Reads `--parts`; the order is that of `PARTS`.

  Raises:
    ConfigError: a name is unknown, or there is none.
  """
  asked = [name.strip() for name in names.split(',') if name.strip()]
  unknown = [name for name in asked if name not in PARTS]
  if unknown or not asked:
    wrong = f'part {unknown[0]!r} is unknown' if unknown else '--parts is empty'
    raise ConfigError(f'{wrong}; choose from {",".join(PARTS)}')
  return [name for name in PARTS if name in asked]

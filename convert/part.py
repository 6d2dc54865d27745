"""One component on its way into a model folder: everything is checked before anything is written."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
import re
from typing import NamedTuple

import numpy as np
import torch

from convert import naming, published
from dicetalk_jax import bundle
from dicetalk_jax.errors import InputError
from dicetalk_jax.models import core, registry

DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16, 'float32': torch.float32}
KEEP = 'keep'

# What a nonsensical configuration makes a constructor raise.
_NONSENSE = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError)


@dataclasses.dataclass(frozen=True)
class Part:
  """A component and the published tensors for it.

  Attributes:
    name: of the component.
    config: of the component, as published.
    tensors: by published key, without a prefix that the whole file shares.
    files: where they come from.
    licence: of those files.
    unused: keys (regular expression) that the file carries and the model may leave aside.
    strict: whether other surplus keys are refused; otherwise they are reported, as the original program has it.
    notes: what the report says besides.
  """

  name: str
  config: dict
  tensors: published.StateDict
  files: tuple[pathlib.Path, ...]
  licence: str
  unused: str | None = None
  strict: bool = True
  notes: tuple[str, ...] = ()


class Checked(NamedTuple):
  """A part that fits its model, or the `problems` why not."""

  part: Part
  config: core.ModelConfig
  keys: dict[str, str]  # our name -> published key
  left_over: list[str]  # surplus keys that nobody expects
  problems: list[str]


def check(part: Part, dtype: str, done: Callable[[], object]) -> Checked:
  """Fits names and shapes, and reads every value once; `done` is called after each tensor.

  Raises:
    InputError: the configuration makes no model.
  """
  fitted = fit(part)
  problems = list(fitted.problems)
  for key in fitted.keys.values():
    problems += [f'{part.name}: {line}' for line in _bad_values(key, part.tensors[key], dtype)]
    done()
  return fitted._replace(problems=problems)


def fit(part: Part) -> Checked:
  """Fits names and shapes, without reading values.

  Raises:
    InputError: the configuration makes no model.
  """
  config, target = model(part)
  found = naming.match(target, {key: tuple(x.shape) for key, x in part.tensors.items()})
  expected = re.compile(part.unused).match if part.unused else lambda key: None
  left_over = [key for key in found.left_over if not expected(key)]
  problems = found._replace(left_over=left_over if part.strict else []).problems()
  return Checked(part, config, found.keys, left_over, [f'{part.name}: {line}' for line in problems])


def model(part: Part) -> tuple[core.ModelConfig, core.Abstract]:
  """Typed configuration and parameter shapes of a part's component."""
  try:
    config = registry.config_of(part.name, part.config)
    return config, _target(part.name, config)
  except _NONSENSE as error:
    cause = str(error).partition('\n')[0]
    raise InputError(f'the configuration of {part.name} makes no model ({cause}); use the published one') from error


@functools.lru_cache
def _target(name: str, config: core.ModelConfig) -> core.Abstract:
  return core.abstract(registry.builder(name, config.to_json()))[1]


def _bad_values(key: str, tensor: torch.Tensor, dtype: str) -> list[str]:
  if tensor.dtype not in (*DTYPES.values(), torch.float64):
    return [f'type {str(tensor.dtype).removeprefix("torch.")} instead of floating point of 16 to 64 bits: {key}']
  if not torch.isfinite(tensor).all():
    return [f'values that are not finite: {key}']
  wanted = stored_dtype(tensor, dtype)
  if wanted != tensor.dtype and not torch.isfinite(tensor.to(wanted)).all():
    return [f'values beyond the range of {str(wanted).removeprefix("torch.")}: {key}']
  return []


def stored_dtype(tensor: torch.Tensor, dtype: str) -> torch.dtype:
  """The type to store a tensor in; unusual ones (float64) become float32 where they are to be kept."""
  if dtype == KEEP:
    return tensor.dtype if tensor.dtype in DTYPES.values() else torch.float32
  return DTYPES[dtype]


def values(checked: Checked, dtype: str) -> dict[str, np.ndarray]:
  """Flat parameters by our names. Those whose type is kept stay in their file."""
  tensors = checked.part.tensors
  return {name: naming.value_from_torch(name, published.to_numpy(tensors[key].to(stored_dtype(tensors[key], dtype))))
          for name, key in checked.keys.items()}


def save(folder: pathlib.Path, checked: Checked, dtype: str, sources: dict[str, str]) -> dict[str, np.ndarray]:
  """Writes a component of a model folder; `sources` are files with SHA-256. Returns what was written."""
  params = values(checked, dtype)
  bundle.save_component(folder, checked.part.name, checked.config.to_json(), params,
                        dict(files=sources, licence=checked.part.licence, source='python -m convert'))
  return params

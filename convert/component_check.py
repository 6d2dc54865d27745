"""One component on its way into a model folder: everything is checked before
anything is written.
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from convert import naming, torch_files
from dicetalk_jax import bundle
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.models import parameters, registry

DTYPES = {
  'float16': torch.float16,
  'bfloat16': torch.bfloat16,
  'float32': torch.float32,
}
KEEP = 'keep'
BEYOND = 'values beyond the range of'

# What a nonsensical configuration makes a constructor raise.
_NONSENSE = (
  TypeError,
  ValueError,
  KeyError,
  IndexError,
  AttributeError,
  ArithmeticError,
)


@dataclasses.dataclass(frozen=True)
class Part:
  """A component and the published tensors for it.

  One that no module here computes is carried along as it is.

  Attributes:
    name: of the component.
    config: of the component, as published.
    tensors: by published key, without a prefix that the whole file shares.
    files: where they come from.
    licence: of those files.
    strict: whether surplus keys are refused; otherwise they are reported, as the
      original program has it.
    aside: other keys of the files, which the original program leaves aside.
    notes: what the report says besides.
  """

  name: str
  config: dict
  tensors: torch_files.StateDict
  files: tuple[pathlib.Path, ...]
  licence: str
  strict: bool = True
  aside: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


class Checked(NamedTuple):
  """A part that fits its model, or the `problems` why not."""

  part: Part
  config: dict  # in JSON form
  keys: dict[str, str]  # our name -> published key
  left_over: list[str]  # surplus keys
  problems: list[str]


def check(part: Part, dtype: str, done: Callable[[], object]) -> Checked:
  """Fits names and shapes, and reads every value once; `done` is called after each
  tensor.

  Raises:
    InputError: the configuration makes no model.
  """
  fitted = fit(part)
  problems = list(fitted.problems)
  for key in fitted.keys.values():
    problems += [
      f'{part.name}: {line}' for line in _bad_values(key, part.tensors[key], dtype)
    ]
    done()
  return fitted._replace(problems=problems)


def fit(part: Part) -> Checked:
  """Fits names and shapes, without reading values.

  Raises:
    InputError: the configuration makes no model.
    WeightsError: the file is that of another component.
  """
  config, target = model(part)
  found = naming.match(target, {key: tuple(x.shape) for key, x in part.tensors.items()})
  if not found.keys and not found.misshaped:
    raise WeightsError(
      f'{part.files[-1]} has nothing of {part.name}; use the published file'
    )
  problems = found._replace(left_over=found.left_over if part.strict else []).problems()
  left_over = [*part.aside, *found.left_over]
  return Checked(
    part, config, found.keys, left_over, [f'{part.name}: {line}' for line in problems]
  )


def model(part: Part) -> tuple[dict, parameters.Abstract]:
  """Configuration and parameter shapes of a part's component."""
  if part.name not in registry.COMPONENTS:
    return part.config, {
      key: jax.ShapeDtypeStruct(tuple(x.shape), jnp.float32)
      for key, x in part.tensors.items()
    }
  try:
    config = registry.config_of(part.name, part.config)
    return config.to_json(), _target(part.name, config)
  except _NONSENSE as error:
    cause = str(error).partition('\n')[0]
    raise InputError(
      f'the configuration of {part.name} makes no model ({cause}); use the published '
      'one'
    ) from error


@functools.lru_cache
def _target(name: str, config: parameters.ModelConfig) -> parameters.Abstract:
  return parameters.abstract(registry.builder(name, config.to_json()))[1]


def _bad_values(key: str, tensor: torch.Tensor, dtype: str) -> list[str]:
  if tensor.dtype not in (*DTYPES.values(), torch.float64):
    return [
      f'type {str(tensor.dtype).removeprefix("torch.")} instead of floating point of '
      f'16 to 64 bits: {key}'
    ]
  if not torch.isfinite(tensor).all():
    return [f'values that are not finite: {key}']
  wanted = stored_dtype(tensor, dtype)
  if wanted != tensor.dtype and not torch.isfinite(tensor.to(wanted)).all():
    return [f'{BEYOND} {str(wanted).removeprefix("torch.")}: {key}']
  return []


def stored_dtype(tensor: torch.Tensor, dtype: str) -> torch.dtype:
  """The type to store a tensor in; unusual ones (float64) become float32 where they
  are to be kept.
  """
  if dtype == KEEP:
    return tensor.dtype if tensor.dtype in DTYPES.values() else torch.float32
  return DTYPES[dtype]


def values(checked: Checked, dtype: str) -> dict[str, np.ndarray]:
  """Flat parameters by our names. Those whose type is kept stay in their file."""
  tensors = checked.part.tensors
  return {
    name: naming.value_from_torch(
      name, torch_files.to_numpy(tensors[key].to(stored_dtype(tensors[key], dtype)))
    )
    for name, key in checked.keys.items()
  }


def save(
  folder: pathlib.Path,
  checked: Checked,
  dtype: str,
  sources: dict[str, str],
  learned_on: str,
) -> dict[str, np.ndarray]:
  """Writes a component of a model folder.

  Args:
    folder: the model folder.
    checked: the component.
    dtype: to store it in.
    sources: files with SHA-256.
    learned_on: of an emotion model, the embedder whose priors it learned on.

  Returns:
    The parameters that were written.
  """
  params = values(checked, dtype)
  provenance = dict(
    files=sources, licence=checked.part.licence, source='python -m convert'
  )
  bundle.save_component(
    folder,
    checked.part.name,
    checked.config,
    params,
    provenance,
    priors=learned_on if checked.part.name == bundle.EMOTION_MODEL else None,
  )
  return params

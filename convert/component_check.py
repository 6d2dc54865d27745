"""One component on its way into a model folder: first checked, then written."""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

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
KEEP = 'keep'  # stores every tensor in the dtype of its file
OUT_OF_RANGE = 'values beyond the range of'

# What constructors raise for a configuration that makes no sense.
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

  A component that no module here computes is carried along unchanged.

  Attributes:
    name: of the component.
    config: of the component, as published.
    tensors: by published key, without a prefix that the whole file shares.
    files: where the tensors come from.
    licence: of those files.
    strict: whether surplus keys are refused. Otherwise they are reported, as in the
      reference implementation.
    ignored: other keys of the files, which the reference implementation ignores.
    notes: further lines for the summary.
  """

  name: str
  config: dict[str, Any]
  tensors: torch_files.StateDict
  files: tuple[pathlib.Path, ...]
  licence: str
  strict: bool = True
  ignored: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


class Checked(NamedTuple):
  """A part, how it fits its model, and the `problems` if it does not."""

  part: Part
  config: dict[str, Any]  # in JSON form
  keys: dict[str, str]  # our name -> published key
  left_over: list[str]  # surplus keys
  problems: list[str]


def check(part: Part, dtype: str, done: Callable[[], object]) -> Checked:
  """Checks names and shapes, and reads every value once.

  Args:
    part: the component.
    dtype: to store it in, one of `DTYPES` or `KEEP`.
    done: called after each tensor.

  Raises:
    InputError: the configuration does not make a model.
  """
  fitted = fit(part)
  problems = list(fitted.problems)
  for key in fitted.keys.values():
    if problem := _value_problem(part.tensors[key], dtype):
      problems.append(f'{part.name}: {problem}: {key}')
    done()
  return fitted._replace(problems=problems)


def without_wrapper(part: Part, prefix: str = '') -> Part:
  """Removes what a wrapper of the model put in front of all keys, and says so.

  `DataParallel` adds `module.`, `torch.compile` adds `_orig_mod.`, and others add the
  name that the model has in them. Whatever all keys share is removed if the rest are
  the keys of the component.

  Args:
    part: the component.
    prefix: that its published keys have themselves.
  """
  wanted = {naming.torch_name(name) for name in model(part)[1]}
  wanted |= {f'{prefix}{key}' for key in wanted}

  def hits(start: str) -> int:
    return sum(key.removeprefix(start) in wanted for key in part.tensors)

  starts = ['', *_shared_starts(part.tensors)]
  best = max(starts, key=hits)  # the shortest of equal ones
  if not best:
    return part
  tensors = {key.removeprefix(best): x for key, x in part.tensors.items()}
  note = f'{part.name}: all keys of {part.files[-1].name} begin with {best}, removed'
  return dataclasses.replace(part, tensors=tensors, notes=(*part.notes, note))


def _shared_starts(keys: Iterable[str]) -> list[str]:
  """Lists the dotted beginnings that all keys share, shortest first."""
  paths = [key.split('.')[:-1] for key in keys]
  shared: list[str] = []
  for names in zip(*paths):
    if len(set(names)) > 1:
      break
    shared.append(names[0])
  return [f'{".".join(shared[:count])}.' for count in range(1, len(shared) + 1)]


def fit(part: Part) -> Checked:
  """Checks names and shapes without reading values.

  Raises:
    InputError: the configuration does not make a model.
    WeightsError: the file belongs to another component.
  """
  config, target = model(part)
  found = naming.match(target, {key: tuple(x.shape) for key, x in part.tensors.items()})
  if not found.keys and not found.misshaped:
    raise WeightsError(
      f'{part.files[-1]} has nothing of {part.name}; use the published file'
    )
  refused = found if part.strict else found._replace(left_over=[])
  return Checked(
    part=part,
    config=config,
    keys=found.keys,
    left_over=[*part.ignored, *found.left_over],
    problems=[f'{part.name}: {line}' for line in refused.problems()],
  )


def model(part: Part) -> tuple[dict[str, Any], parameters.Abstract]:
  """Gives the configuration and the parameter shapes of a part's component."""
  if part.name not in registry.COMPONENTS:
    return part.config, {
      key: jax.ShapeDtypeStruct(tuple(x.shape), jnp.float32)
      for key, x in part.tensors.items()
    }
  try:
    config = registry.config_of(part.name, part.config)
    return config.to_json(), _parameter_shapes(part.name, config)
  except _NONSENSE as error:
    cause = str(error).partition('\n')[0]
    raise InputError(
      f'the configuration of {part.name} does not make a model ({cause}); use the '
      'published one'
    ) from error


@functools.lru_cache
def _parameter_shapes(name: str, config: parameters.ModelConfig) -> parameters.Abstract:
  return parameters.abstract(registry.builder(name, config.to_json()))[1]


def _value_problem(tensor: torch.Tensor, dtype: str) -> str:
  """Describes why the values of a tensor cannot be stored; '' if they can."""
  if tensor.dtype not in (*DTYPES.values(), torch.float64):
    found = _dtype_name(tensor.dtype)
    return f'type {found} instead of floating point of 16 to 64 bits'
  if not torch.isfinite(tensor).all():
    return 'values that are not finite'
  wanted = stored_dtype(tensor, dtype)
  if wanted != tensor.dtype and not torch.isfinite(tensor.to(wanted)).all():
    return f'{OUT_OF_RANGE} {_dtype_name(wanted)}'
  return ''


def _dtype_name(dtype: torch.dtype) -> str:
  return str(dtype).removeprefix('torch.')


def stored_dtype(tensor: torch.Tensor, dtype: str) -> torch.dtype:
  """Gives the dtype to store a tensor in; under `KEEP`, float64 becomes float32."""
  if dtype != KEEP:
    return DTYPES[dtype]
  return tensor.dtype if tensor.dtype in DTYPES.values() else torch.float32


def values(checked: Checked, dtype: str) -> dict[str, np.ndarray]:
  """Gives flat parameters by our names.

  Tensors whose dtype does not change stay in their file, mapped into memory.
  """
  params = {}
  for name, key in checked.keys.items():
    tensor = checked.part.tensors[key]
    stored = torch_files.to_numpy(tensor.to(stored_dtype(tensor, dtype)))
    params[name] = naming.value_from_torch(name, stored)
  return params


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
    sources: SHA-256 of its files, by name.
    learned_on: for an emotion model, the embedder whose priors it learned on.

  Returns:
    The parameters that were written.
  """
  params = values(checked, dtype)
  bundle.save_component(
    folder,
    checked.part.name,
    checked.config,
    params,  # type: ignore[arg-type]  # Orbax also saves NumPy arrays
    {
      'files': sources,
      'licence': checked.part.licence,
      'source': 'python -m convert',
    },
    priors=learned_on if checked.part.name == bundle.EMOTION_MODEL else None,
  )
  return params

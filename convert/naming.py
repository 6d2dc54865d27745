"""The naming rule: how a published key becomes a parameter, and the way back.

The modules in `dicetalk_jax/models` have the attribute names of the published state
dicts. So the path of a tensor stays the same, and only two things differ, both decided
by the last part of our name:

    published key and shape             parameter and shape
    conv_in.weight  (o, i, 3, 3)        conv_in.kernel   (3, 3, i, o)
    proj.weight     (o, i)              proj.kernel      (i, o)
    norm.weight     (c,)                norm.scale       (c,)
    proj.bias       (o,)                proj.bias        (o,)

The last part is translated by `LEAVES`; the axes are moved by `value_from_torch`.
There is no table of parameters: the rule covers every model, in both directions. It is
strict: a missing, surplus or misshaped tensor is an error. Two things happen outside:
prefixes of whole files are stripped (`published_layouts`), and two files of DICE-Talk
may lack tensors or have too many (`dicetalk`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from dicetalk_jax.errors import WeightsError
from dicetalk_jax.models.parameters import Abstract

# Last part of a name: ours -> PyTorch's. All others (bias, mix_factor, ...) are equal.
LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'embedding': 'weight',
  'negative_slope': 'weight',
}

# Published keys that are not parameters: constants that old files carry along.
IGNORED = ('vision_model.embeddings.position_ids',)


def torch_name(name: str) -> str:
  """Gives the published key of a parameter: `conv1.kernel` -> `conv1.weight`."""
  path, _, leaf = name.rpartition('.')
  return f'{path}.{LEAVES.get(leaf, leaf)}'.removeprefix('.')


def value_from_torch(name: str, value: np.ndarray) -> np.ndarray:
  """Moves the axes of a published tensor to our order. The result is a view.

  Linear layers: (o, i) -> (i, o); convolutions: (o, i, *k) -> (*k, i, o). Transposed
  convolutions take the same move: PyTorch stores (i, o, *k), and Flax with
  `transpose_kernel=True` stores (*k, o, i).
  """
  return np.moveaxis(value, (0, 1), (-1, -2)) if name.endswith('kernel') else value


def value_to_torch(name: str, value: np.ndarray) -> np.ndarray:
  """Moves the axes of a parameter to PyTorch's order. The result is a view."""
  return np.moveaxis(value, (-1, -2), (0, 1)) if name.endswith('kernel') else value


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Gives the published shape of the parameter `name` with our `shape`."""
  return value_to_torch(name, np.broadcast_to(False, shape)).shape


class Match(NamedTuple):
  """The tensors of a state dict that a model takes, and those that do not fit."""

  keys: dict[str, str]  # our name -> published key
  missing: list[str]  # keys that the model needs and the state dict lacks
  left_over: list[str]  # keys that the model does not know
  misshaped: list[str]  # one message each

  def problems(self) -> list[str]:
    """Lists what rules out a strict conversion, one line each."""
    return [
      *(f'missing: {key}' for key in self.missing),
      *(f'left over: {key}' for key in self.left_over),
      *self.misshaped,
    ]


def match(target: Abstract, shapes: Mapping[str, tuple[int, ...]]) -> Match:
  """Matches published tensors to the parameters of a model.

  Args:
    target: the parameters, by our names.
    shapes: published shapes, by key.

  Returns:
    Every name of `target` is in `keys`, or its key in `missing` or `misshaped`.
  """
  wanted = {torch_name(name): name for name in target}
  known = shapes.keys() - set(IGNORED)
  keys = {}
  misshaped = []
  for key, name in wanted.items():
    if key not in known:
      continue
    expected = torch_shape(name, target[name].shape)
    if tuple(shapes[key]) == expected:
      keys[name] = key
    else:
      misshaped.append(f'shape {tuple(shapes[key])} instead of {expected}: {key}')
  return Match(
    keys,
    missing=sorted(wanted.keys() - known),
    left_over=sorted(known - wanted.keys()),
    misshaped=misshaped,
  )


def to_torch(params: Mapping[str, np.ndarray | jax.Array]) -> dict[str, np.ndarray]:
  """Converts flat parameters to a state dict of contiguous arrays."""
  return {
    torch_name(name): np.ascontiguousarray(value_to_torch(name, np.asarray(value)))
    for name, value in params.items()
  }


def from_torch(
  target: Abstract, state_dict: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Converts a state dict to the flat parameters of `target`; dtypes are kept.

  Raises:
    WeightsError: names every missing, left-over and misshaped tensor at once.
  """
  found = match(target, {key: np.shape(value) for key, value in state_dict.items()})
  if problems := found.problems():
    raise WeightsError(
      f'{len(problems)} tensors do not fit the model:\n  ' + '\n  '.join(problems)
    )
  return {
    name: value_from_torch(name, np.asarray(state_dict[found.keys[name]]))
    for name in target
  }

"""The naming rule: PyTorch state dict <-> flat JAX parameters, by layer kind, strict,
both ways.

Modules carry the attribute names of the published state dicts, so only two things
differ: the last part of a name and the order of axes. There is no table of parameters.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dicetalk_jax.errors import WeightsError
from dicetalk_jax.models.parameters import Abstract

# Last part of a name, ours -> PyTorch's. Whatever is not here (bias, mix_factor, ...)
# is the same.
LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'embedding': 'weight',
  'negative_slope': 'weight',
}

# Published keys that are no parameters (constants that old files carry along).
IGNORED = ('vision_model.embeddings.position_ids',)


def torch_name(name: str) -> str:
  """`conv1.kernel` -> `conv1.weight`."""
  path, _, leaf = name.rpartition('.')
  return f'{path}.{LEAVES.get(leaf, leaf)}'.removeprefix('.')


def value_from_torch(name: str, value: np.ndarray) -> np.ndarray:
  """One tensor in our order of axes, a view: linear (o, i) -> (i, o); convolution (o,
  i, *k) -> (*k, i, o).

  A transposed convolution is no exception: on both sides its kernel is that of the
  convolution which it transposes (`transpose_kernel=True` in Flax).
  """
  return np.moveaxis(value, (0, 1), (-1, -2)) if name.endswith('kernel') else value


def value_to_torch(name: str, value: np.ndarray) -> np.ndarray:
  """One parameter in PyTorch's order of axes, a view."""
  return np.moveaxis(value, (-1, -2), (0, 1)) if name.endswith('kernel') else value


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape in PyTorch's layout of our parameter `name` with `shape`."""
  return value_to_torch(name, np.broadcast_to(False, shape)).shape


class Match(NamedTuple):
  """Which tensors of a state dict a model takes."""

  keys: dict[str, str]  # our name -> published key
  missing: list[str]  # keys that the model wants and the state dict lacks
  left_over: list[str]  # keys that the model does not know
  misshaped: list[str]  # one sentence each

  def problems(self) -> list[str]:
    """What forbids a strict conversion, one line each."""
    return [
      *(f'missing: {k}' for k in self.missing),
      *(f'left over: {k}' for k in self.left_over),
      *self.misshaped,
    ]


def match(target: Abstract, shapes: Mapping[str, tuple[int, ...]]) -> Match:
  """Fits the published `shapes` (by key) to `target`; every name of it is in `keys`,
  `missing` or `misshaped`.
  """
  wanted = {torch_name(name): name for name in target}
  known = shapes.keys() - set(IGNORED)
  keys, misshaped = {}, []
  for key, name in wanted.items():
    if key not in known:
      continue
    expected = torch_shape(name, target[name].shape)
    if tuple(shapes[key]) == expected:
      keys[name] = key
    else:
      misshaped.append(f'shape {tuple(shapes[key])} instead of {expected}: {key}')
  return Match(
    keys, sorted(wanted.keys() - known), sorted(known - wanted.keys()), misshaped
  )


def to_torch(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Flat JAX parameters to a PyTorch state dict of contiguous arrays."""
  return {
    torch_name(k): np.ascontiguousarray(value_to_torch(k, np.asarray(v)))
    for k, v in params.items()
  }


def from_torch(
  target: Abstract, state_dict: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """A PyTorch state dict to the flat parameters of `target` (names to shapes); dtypes
  are kept.

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

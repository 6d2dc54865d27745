"""The naming rule: PyTorch state dict <-> flat JAX parameters, by layer kind, strict, both ways.

Modules carry the attribute names of the published state dicts, so only two things differ: the last
part of a name and the order of axes. There is no table of parameters.
"""

from collections.abc import Mapping

import numpy as np

from dicetalk_jax.errors import WeightsError
from dicetalk_jax.models.core import Abstract

# Last part of a name, ours -> PyTorch's. Whatever is not here (bias, mix_factor, ...) is the same.
LEAVES = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight', 'negative_slope': 'weight'}

# Published keys that are no parameters (constants that old files carry along).
IGNORED = ('vision_model.embeddings.position_ids',)


def torch_name(name: str) -> str:
  """`conv1.kernel` -> `conv1.weight`."""
  path, _, leaf = name.rpartition('.')
  return f'{path}.{LEAVES.get(leaf, leaf)}'.removeprefix('.')


def _axes_from_torch(name: str, value: np.ndarray) -> np.ndarray:
  """Linear (o, i) -> (i, o); convolution (o, i, *k) -> (*k, i, o).

  A transposed convolution is no exception: on both sides its kernel is that of the convolution which it transposes
  (`transpose_kernel=True` in Flax).
  """
  return np.moveaxis(value, (0, 1), (-1, -2)) if name.endswith('kernel') else value


def _axes_to_torch(name: str, value: np.ndarray) -> np.ndarray:
  return np.moveaxis(value, (-1, -2), (0, 1)) if name.endswith('kernel') else value


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape in PyTorch's layout of our parameter `name` with `shape`."""
  return _axes_to_torch(name, np.broadcast_to(False, shape)).shape


def to_torch(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Flat JAX parameters to a PyTorch state dict of contiguous arrays."""
  return {torch_name(k): np.ascontiguousarray(_axes_to_torch(k, np.asarray(v))) for k, v in params.items()}


def from_torch(target: Abstract, state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A PyTorch state dict to the flat parameters of `target` (names to shapes); dtypes are kept.

  Raises:
    WeightsError: names every missing, left-over and misshaped tensor at once.
  """
  source = {k: v for k, v in state_dict.items() if k not in IGNORED}
  wanted = {torch_name(name): name for name in target}
  problems = [f'missing: {key}' for key in sorted(wanted.keys() - source.keys())]
  problems += [f'left over: {key}' for key in sorted(source.keys() - wanted.keys())]
  out = {}
  for key in wanted.keys() & source.keys():
    name, value = wanted[key], _axes_from_torch(wanted[key], np.asarray(source[key]))
    if value.shape != target[name].shape:
      expected = torch_shape(name, target[name].shape)
      problems.append(f'shape {source[key].shape} instead of {expected}: {key}')
    out[name] = value
  if problems:
    raise WeightsError(f'{len(problems)} tensors do not fit the model:\n  ' + '\n  '.join(problems))
  return {name: out[name] for name in target}

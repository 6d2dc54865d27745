"""Weights and inputs that follow from a rule, so that full-size modules can be checked without gigabytes of files.

A tensor is `base + amp * (2 u - 1)` with u uniform in [0, 1): the upper 53 bits of PCG64's raw numbers, in C order of
the published layout. NumPy guarantees these numbers for all time.
"""

from collections.abc import Mapping
from typing import Any
import zlib

import jax.numpy as jnp
import numpy as np

from convert import naming
from dicetalk_jax.models.core import Abstract, Params


def _symmetric(seed: int, shape: tuple[int, ...]) -> np.ndarray:
  """Uniform in [-1, 1), float64."""
  raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
  return ((raw >> np.uint64(11)) * 2.0 ** -52 - 1).reshape(shape)


def inputs(meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The input tensors that a description asks for, float32."""
  out = {}
  for name, rule in meta['inputs'].items():
    seed = zlib.crc32(f'input:{name}'.encode()) ^ meta['base_seed']
    out[name] = np.float32(rule['amp'] * _symmetric(seed, rule['shape'])) + np.float32(rule['base'])
  return out


def params(meta: Mapping[str, Any], target: Abstract) -> Params:
  """The parameters of `target`, made and converted one at a time: no second copy of a large module ever exists.

  Raises:
    WeightsError: the description names other tensors than the module has.
  """
  rules = meta['weights_seed_base_amp']
  shapes = {key: naming.torch_shape(name, x.shape) for name, x in target.items()
            if (key := naming.torch_name(name)) in rules}
  naming.from_torch(target, {key: np.broadcast_to(np.float32(0), shapes.get(key, ())) for key in rules})
  out = {}
  for name, x in target.items():
    key = naming.torch_name(name)
    seed, base, amp = rules[key]
    value = np.float32(base + amp * _symmetric(seed, shapes[key]))
    out[name] = jnp.asarray(naming.from_torch({name: x}, {key: value})[name])
  return out

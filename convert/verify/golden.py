"""Golden files: reference inputs and outputs in PyTorch's layouts, each set
described by one JSON file.
"""

from collections.abc import Callable, Mapping
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from convert import naming
from convert.torch_files import read_json
from convert.verify import seeded_weights
from dicetalk_jax.errors import InputError
from dicetalk_jax.models import parameters, registry

# Limits relative to the deviation: ten times what the published modules differ by
# between float32 and float64.
LIMIT, ENCODE, DECODE = 2e-5, 3e-5, 2e-4
EXACT = 0.0


class Case(NamedTuple):
  """One comparison.

  Attributes:
    name: of the output that it reproduces.
    actual: our array, in the layout of the output.
    limit: of the error, relative to the output's deviation.
    expected: None for the output of that name.
  """

  name: str
  actual: np.ndarray
  limit: float
  expected: np.ndarray | None = None


class Tensors(dict):
  """A safetensors file; asking for what it lacks is a `UserError`, as are a missing
  and a damaged file.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    try:
      super().__init__(load_file(path))
    except FileNotFoundError:
      raise InputError(
        f'{path} does not exist; the golden files beside it need it'
      ) from None
    except (OSError, SafetensorError) as error:
      raise InputError(
        f'{path} cannot be read as safetensors ({error}); copy it again'
      ) from None

  def __missing__(self, name: str):
    raise InputError(
      f'{self._path} has no tensor {name}; use the file that belongs to this component'
    )


def weights_of(path: pathlib.Path) -> Mapping[str, np.ndarray]:
  """The weights in a file, or as the description beside it says how to draw them where
  there is none.

  Raises:
    InputError: neither the file nor a rule exists, or see `drawn.draw`.
  """
  description = path.with_name('config.json')
  if (
    not path.exists()
    and description.exists()
    and 'drawn' in (meta := read_json(description))
  ):
    return seeded_weights.draw(meta, f'weights of {description}')
  return Tensors(path)


class Golden:
  """One set of golden files: `path` is the description, `meta` its content, `folder`
  where the tensors are.

  Args:
    path: the JSON file.
    files: names, without `.safetensors`, of the files among weights, inputs and outputs
      that belong to it; `{stem}` stands for the name of the description.
    dtype: compute type of the networks; None is float32, which the limits are made for.
  """

  def __init__(
    self,
    path: pathlib.Path,
    files: Mapping[str, str],
    dtype: jax.typing.DTypeLike | None = None,
  ):
    self.folder, self.meta, self.dtype = path.parent, read_json(path), dtype

    def file(part):
      return self.folder / f'{files[part].format(stem=path.stem)}.safetensors'

    self.weights = weights_of(file('weights')) if 'weights' in files else {}
    self.inputs, self.outputs = (
      Tensors(file(part)) if part in files else {} for part in ('inputs', 'outputs')
    )

  @property
  def constructor(self) -> dict[str, Any]:
    return self.meta['constructor']

  def small_signal(self) -> dict[str, np.ndarray]:
    """Weights with some scaled down, which makes the epsilons of the norms visible."""
    rule = self.meta['small_signal']

    def kept(key):
      return (
        key.startswith(rule.get('exclude_prefix', '\0'))
        or rule.get('exclude_substring', '\0') in key
      )

    def hit(key):
      return key.endswith(tuple(rule['key_suffixes'])) and not kept(key)

    return {
      k: v * np.float32(rule['factor']) if hit(k) else v
      for k, v in self.weights.items()
    }


class Module:
  """A component with converted parameters; a method compiles once per shape,
  whatever the weights.
  """

  def __init__(
    self,
    name: str,
    config: Mapping[str, Any],
    make_params: Callable[[parameters.Abstract], Mapping[str, jax.Array]],
    dtype: jax.typing.DTypeLike | None = None,
  ):
    """`config` and `dtype` as `models.registry` takes them.

    `make_params` makes the values for the abstract ones.
    """
    self.config = registry.config_of(name, config)
    build = registry.builder(name, config, dtype)
    self.graphdef, self.target = graphdef, target = parameters.abstract(build)
    self.params = jax.tree.map(jnp.asarray, make_params(target))
    # Without `self` inside, gigabytes go as soon as the module does.
    self._call = jax.jit(
      lambda params, method, args: method(parameters.merge(graphdef, params), *args),
      static_argnums=1,
    )

  @classmethod
  def of(
    cls,
    name: str,
    golden: Golden,
    weights: Mapping[str, np.ndarray] | None = None,
    **config,
  ) -> 'Module':
    """The module of a golden, with its own weights unless others are given."""
    weights = golden.weights if weights is None else weights

    def convert(target):
      return naming.from_torch(target, weights)

    return cls(name, golden.constructor | config, convert, golden.dtype)

  def __call__(
    self, method: Callable, *args, weights: Mapping[str, np.ndarray] | None = None
  ):
    """`method(module, *args)` as NumPy arrays; `weights` are published ones in place
    of its own.
    """
    params = self.params if weights is None else naming.from_torch(self.target, weights)
    return jax.tree.map(np.asarray, self._call(params, method, args))


def forward(model, *args):
  return model(*args)


def channels_last(x: np.ndarray) -> np.ndarray:
  """[B,C,...] to [B,...,C]."""
  return np.moveaxis(x, 1, -1)


def channels_first(x: np.ndarray) -> np.ndarray:
  """[B,...,C] to [B,C,...]."""
  return np.moveaxis(x, -1, 1)

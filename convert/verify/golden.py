"""Golden files: reference inputs and outputs, each set described by one JSON file.

All tensors are in PyTorch's layouts.
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

# Limits relative to the deviation: ten times the difference of the published modules
# between float32 and float64.
LIMIT = 2e-5
ENCODE = 3e-5
DECODE = 2e-4
EXACT = 0.0


class Case(NamedTuple):
  """One comparison.

  Attributes:
    name: of the output that it reproduces.
    actual: our array, in the layout of the output.
    limit: of the error, relative to the output's deviation.
    expected: the reference; None stands for the golden output of that name.
  """

  name: str
  actual: np.ndarray
  limit: float
  expected: np.ndarray | None = None


class Tensors(dict):
  """The tensors of a safetensors file, by name.

  Raises:
    InputError: the file is missing or damaged, or, when indexed, lacks a tensor.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    try:
      super().__init__(load_file(path))
    except FileNotFoundError:
      raise InputError(
        f'{path} does not exist; the golden files next to it need it'
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
  """Reads weights from a file, or draws them by the rule in the description next to it.

  Raises:
    InputError: there is neither a file nor a rule, or the weights cannot be drawn (see
      `seeded_weights.draw`).
  """
  description = path.with_name('config.json')
  if not path.exists() and description.exists():
    meta = read_json(description)
    if 'drawn' in meta:
      return seeded_weights.draw(meta, f'weights of {description}')
  return Tensors(path)


def params_of(path: pathlib.Path, target: parameters.Abstract) -> dict[str, np.ndarray]:
  """Converts the weights of `weights_of` to the parameters of `target`."""
  return naming.from_torch(target, weights_of(path))


class Golden:
  """One set of golden files.

  Attributes:
    folder: of the files.
    meta: content of the description.
    dtype: compute dtype of the networks; None is float32, which the limits are made
      for.
    weights, inputs, outputs: tensors by name.
  """

  def __init__(
    self,
    path: pathlib.Path,
    files: Mapping[str, str],
    dtype: jax.typing.DTypeLike | None = None,
  ):
    """Reads the files that a description belongs to.

    Args:
      path: the description.
      files: which of weights, inputs and outputs have a file, and its name without
        `.safetensors`; `{stem}` stands for the name of the description.
      dtype: see above.
    """
    self.folder = path.parent
    self.meta = read_json(path)
    self.dtype = dtype
    places = {
      content: self.folder / f'{name.format(stem=path.stem)}.safetensors'
      for content, name in files.items()
    }
    self.weights: Mapping[str, np.ndarray] = {}
    if 'weights' in places:
      self.weights = weights_of(places['weights'])
    self.inputs = Tensors(places['inputs']) if 'inputs' in places else {}
    self.outputs = Tensors(places['outputs']) if 'outputs' in places else {}

  @property
  def constructor(self) -> dict[str, Any]:
    return self.meta.get('constructor', {})  # published sizes have none

  def small_signal(self) -> dict[str, np.ndarray]:
    """Scales some weights down, which makes the epsilons of the norms visible."""
    rule = self.meta['small_signal']
    suffixes = tuple(rule['key_suffixes'])
    nothing = '\0'  # in no key
    scaled = {}
    for key, value in self.weights.items():
      excluded = (
        key.startswith(rule.get('exclude_prefix', nothing))
        or rule.get('exclude_substring', nothing) in key
      )
      if key.endswith(suffixes) and not excluded:
        value = value * np.float32(rule['factor'])
      scaled[key] = value
    return scaled


class Module:
  """A component with converted parameters.

  A method compiles once per shape, whatever the weights.
  """

  def __init__(
    self,
    name: str,
    config: Mapping[str, Any],
    make_params: Callable[[parameters.Abstract], Mapping[str, Any]],
    dtype: jax.typing.DTypeLike | None = None,
  ):
    """Makes the module and its parameters.

    Args:
      name: of the component.
      config: of the component, as `models.registry` takes it.
      make_params: makes the arrays for the abstract parameters.
      dtype: to compute in, as `models.registry` takes it.
    """
    self.config: Any = registry.config_of(name, config)
    build = registry.builder(name, config, dtype)
    graphdef, target = parameters.abstract(build)
    self.graphdef = graphdef
    self.target = target
    self.params = jax.tree.map(jnp.asarray, make_params(target))
    # Without a reference to `self`, gigabytes are freed as soon as the module is.
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
    """Makes the module of golden files, with their weights unless others are given."""
    if weights is None:
      weights = golden.weights
    return cls(
      name,
      golden.constructor | config,
      lambda target: naming.from_torch(target, weights),
      golden.dtype,
    )

  def __call__(
    self, method: Callable, *args, weights: Mapping[str, np.ndarray] | None = None
  ):
    """Computes `method(module, *args)` as NumPy arrays.

    Args:
      method: a function of the module.
      *args: its other arguments.
      weights: published weights to use instead of the module's own.
    """
    if weights is None:
      params: Mapping[str, Any] = self.params
    else:
      params = naming.from_torch(self.target, weights)
    return jax.tree.map(np.asarray, self._call(params, method, args))


def forward(model, *args):
  """Calls the model itself: the usual method of a `Module`."""
  return model(*args)


def channels_last(x: np.ndarray) -> np.ndarray:
  """Moves the channels: [B,C,...] to [B,...,C]."""
  return np.moveaxis(x, 1, -1)


def channels_first(x: np.ndarray) -> np.ndarray:
  """Moves the channels: [B,...,C] to [B,C,...]."""
  return np.moveaxis(x, -1, 1)

"""Parameters of models: one flat dict with dotted names.

Modules live inside traced functions only. The dotted name of a parameter is its key in
the published PyTorch files (leaf names apart), so one name serves conversion, sharding
rules, freezing and checkpoints.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Self
import zlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, jax.Array]
Abstract = dict[str, jax.ShapeDtypeStruct]


class ParamKeys(nnx.Rngs):
  """Key source for constructors, in place of `nnx.Rngs`.

  Counting in Python keeps abstract construction linear in the number of parameters:
  `nnx.Rngs` makes it quadratic (100 s instead of 3 s for the full UNet).
  """

  def __init__(self, key: jax.Array):
    self._key = key
    self._count = 0

  def params(self) -> jax.Array:
    """Returns a new key."""
    self._count += 1
    return jax.random.fold_in(self._key, self._count)


def split(model: nnx.Module) -> tuple[nnx.GraphDef[Any], dict[str, Any]]:
  """Splits a module into its hashable structure and its parameters by dotted name."""
  graphdef, state = nnx.split(model)
  flat = nnx.to_flat_state(state)
  return graphdef, {'.'.join(map(str, path)): v.get_value() for path, v in flat}


def merge(graphdef: nnx.GraphDef[Any], *parts: Mapping[str, Any]) -> Any:
  """Builds the module of a structure and parameters; several dicts are joined.

  Use inside `jax.jit`.
  """
  tree: dict[str | int, Any] = {}
  for part in parts:
    for name, value in part.items():
      *path, leaf = (int(key) if key.isdigit() else key for key in name.split('.'))
      node = tree
      for key in path:
        node = node.setdefault(key, {})
      node[leaf] = value
  return nnx.merge(graphdef, tree)


def abstract(build: Callable[..., nnx.Module]) -> tuple[nnx.GraphDef[Any], Abstract]:
  """Structure and parameter shapes of `build(rngs=...)`; allocates nothing."""
  return split(nnx.eval_shape(lambda: build(rngs=ParamKeys(jax.random.key(0)))))


def init_params(build: Callable[..., nnx.Module], key: jax.Array) -> Params:
  """Draws the parameters of `build(rngs=...)`.

  One after the other, not under one jit: parameters of one shape share a small program,
  while a program that draws a whole model compiles for minutes at full size.
  """
  _, params = split(build(rngs=ParamKeys(key)))
  return params


def numpy_params(target: Abstract, seed: int = 0) -> Params:
  """Fills parameters for tests and benchmarks without compiling.

  Values are deterministic and independent of the order of parameters.
  """
  params = {}
  for name, x in target.items():
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    deviation = 0.1
    if x.ndim > 1:
      fan_in = int(np.prod(x.shape[:-1]))
      deviation = fan_in**-0.5
    value = rng.normal(size=x.shape) * deviation
    params[name] = jnp.asarray(value + name.endswith('scale'), x.dtype)
  return params


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Base of the frozen config dataclasses; reads a published `config.json` as it is."""

  @classmethod
  def from_json(cls, mapping: Mapping[str, Any]) -> Self:
    """Takes the fields that the dataclass has, and ignores other keys.

    Lists become tuples.
    """
    fields = {field.name for field in dataclasses.fields(cls)}

    def freeze(value: Any) -> Any:
      return tuple(map(freeze, value)) if isinstance(value, list) else value

    return cls(**{key: freeze(v) for key, v in mapping.items() if key in fields})

  def to_json(self) -> dict[str, Any]:
    """The inverse of `from_json`."""
    return dataclasses.asdict(self)


def add_prefix(prefix: str, params: Mapping[str, Any]) -> dict[str, Any]:
  """Names a component's parameters in the whole: `conv_in.kernel` ->
  `unet.conv_in.kernel`.
  """
  return {f'{prefix}.{name}': value for name, value in params.items()}


def strip_prefix(prefix: str, params: Mapping[str, Any]) -> dict[str, Any]:
  """Selects the parameters of one component; the inverse of `add_prefix`."""
  return {
    name.removeprefix(f'{prefix}.'): value
    for name, value in params.items()
    if name.startswith(f'{prefix}.')
  }

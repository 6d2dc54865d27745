"""Modules live inside traced functions; outside, parameters are one flat dict with
dotted names.

The dotted name of a parameter is its published PyTorch key (leaf names apart), so one
name serves conversion, sharding rules, freezing and checkpoints.
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


class ParamKeys:
  """Key source for constructors, in place of `nnx.Rngs`.

  Counting in Python keeps abstract construction linear in the number of parameters:
  `nnx.Rngs` makes it quadratic (100 s against 3 s for the full UNet).
  """

  def __init__(self, key: jax.Array):
    self._key = key
    self._count = 0

  def params(self) -> jax.Array:
    self._count += 1
    return jax.random.fold_in(self._key, self._count)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
  """Takes a module apart into its hashable structure and its parameters by dotted
  name.
  """
  graphdef, state = nnx.split(model)
  flat = nnx.to_flat_state(state)
  return graphdef, {'.'.join(map(str, path)): v.get_value() for path, v in flat}


def merge(graphdef: nnx.GraphDef, *parts: Mapping[str, jax.Array]) -> Any:
  """Puts a module together again; several dicts of parameters are joined.

  Use inside `jax.jit`.
  """
  tree: dict = {}
  for name, value in (item for part in parts for item in part.items()):
    *path, leaf = (int(k) if k.isdigit() else k for k in name.split('.'))
    node = tree
    for key in path:
      node = node.setdefault(key, {})
    node[leaf] = value
  return nnx.merge(graphdef, tree)


def abstract(build: Callable[..., nnx.Module]) -> tuple[nnx.GraphDef, Abstract]:
  """Structure and parameter shapes of `build(rngs=...)`, without memory."""
  return split(nnx.eval_shape(lambda: build(rngs=ParamKeys(jax.random.key(0)))))


def init_params(
  build: Callable[..., nnx.Module], key: jax.Array, names=None, shardings=None
) -> Params:
  """Draws the parameters of `build(rngs=...)`, all of them or only `names`, under one
  jit.

  Draws that are not asked for are dropped by the compiler, so the few parameters that a
  checkpoint lacks cost little even at full size; drawing a full-size model whole
  compiles for minutes.
  """

  def init(key):
    _, params = split(build(rngs=ParamKeys(key)))
    return params if names is None else {name: params[name] for name in names}

  # Each value is drawn once: on the CPU, optimising the program costs far more than it
  # saves.
  quick = {
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  }
  options = quick if jax.default_backend() == 'cpu' else None
  return jax.jit(init, out_shardings=shardings, compiler_options=options)(key)


def numpy_params(target: Abstract, seed: int = 0) -> Params:
  """Deterministic filler for tests and benchmarks: no compilation, values
  independent of order.
  """
  out = {}
  for name, x in target.items():
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    fan_in = int(np.prod(x.shape[:-1])) if x.ndim > 1 else 1
    value = rng.normal(size=x.shape) * (fan_in**-0.5 if x.ndim > 1 else 0.1)
    out[name] = jnp.asarray(value + name.endswith('scale'), x.dtype)
  return out


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Base of the frozen config dataclasses; reads a published `config.json` as it is."""

  @classmethod
  def from_json(cls, mapping: Mapping[str, Any]) -> Self:
    """Takes the fields that the dataclass knows; lists become tuples.

    Other keys are ignored.
    """
    fields = {f.name for f in dataclasses.fields(cls)}

    def freeze(v):
      return tuple(map(freeze, v)) if isinstance(v, list) else v

    return cls(**{k: freeze(v) for k, v in mapping.items() if k in fields})

  def to_json(self) -> dict[str, Any]:
    """The inverse of `from_json`."""
    return dataclasses.asdict(self)


def add_prefix(prefix: str, params: Mapping[str, Any]) -> dict[str, Any]:
  """Names of one component inside a whole: `conv_in.kernel` ->
  `unet.conv_in.kernel`.
  """
  return {f'{prefix}.{name}': value for name, value in params.items()}


def strip_prefix(prefix: str, params: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `prefixed`: the parameters of one component."""
  return {
    name.removeprefix(f'{prefix}.'): v
    for name, v in params.items()
    if name.startswith(f'{prefix}.')
  }

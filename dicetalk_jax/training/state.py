"""The training state: everything that changes from step to step."""

from collections.abc import Callable, Iterable, Mapping
import re
from typing import TypeVar

import flax
import jax
from jax import lax
import jax.numpy as jnp
import optax

from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.parameters import Params

Value = TypeVar('Value')


@flax.struct.dataclass
class TrainState:
  """Everything that a checkpoint holds, besides the position in the data.

  Attributes:
    step: int32 scalar, updates made so far.
    params: trained parameters only.
    ema: exponential moving average of `params`; `{}` without EMA.
    opt_state: optimizer state of `params`.
    extra: arrays of the task that no gradient moves, such as usage counts; see
      `Task.extra_state`.
  """

  step: jax.Array
  params: Params
  ema: Params
  opt_state: optax.OptState
  extra: Params

  @property
  def averaged(self) -> Params:
    """The parameters to evaluate and to export: the EMA, if there is one."""
    return self.ema or self.params


def init_state(
  params: Params,
  tx: optax.GradientTransformation,
  ema: bool,
  extra: Callable[[Params], Params] = lambda params: {},
) -> TrainState:
  """Makes the state before the first step; the EMA begins at the initial parameters."""
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    extra=extra(params),
    ema=jax.tree.map(jnp.copy, params) if ema else {},
    opt_state=tx.init(params),
  )
  # Weak types do not outlive a step: with one, the step would be compiled twice.
  return jax.tree.map(lambda x: lax.convert_element_type(x, jnp.result_type(x)), state)


def partition(
  params: Mapping[str, Value],
  patterns: Iterable[str],
  *,
  sets: Mapping[str, tuple[str, ...]] = {},
  constants: Iterable[str] = (),
) -> tuple[dict[str, Value], dict[str, Value]]:
  """Splits parameters into trained and frozen ones: a parameter is trained if any of
  the regular expressions is found in its dotted name.

  Args:
    params: by dotted name.
    patterns: regular expressions, or names of `sets`.
    sets: regular expressions by name.
    constants: regular expressions of parameters that are never trained.

  Returns:
    Trained and frozen parameters.

  Raises:
    ConfigError: a pattern is not a regular expression, or no name contains it.
  """
  expressions: list[str] = []
  for pattern in patterns:
    expressions += sets.get(pattern, (pattern,))
  constant = [name for name in params if any(re.search(c, name) for c in constants)]

  chosen: set[str] = set()
  for expression in expressions:
    try:
      found = [name for name in params if re.search(expression, name)]
    except re.error as error:
      raise ConfigError(
        f"trainable pattern '{expression}' is not a regular expression: {error}"
      ) from error
    if not found:
      named = f'; sets are: {", ".join(sets)}' if sets else ''
      raise ConfigError(
        f"trainable pattern '{expression}' matches no parameter; names look like "
        f"'{min(params)}'{named}"
      )
    chosen.update(found)

  chosen -= set(constant)
  if not chosen:
    raise ConfigError('config.trainable is empty: nothing would be trained')
  trained = {name: x for name, x in params.items() if name in chosen}
  frozen = {name: x for name, x in params.items() if name not in chosen}
  return trained, frozen

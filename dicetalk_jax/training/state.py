"""What training changes from step to step."""

from collections.abc import Callable, Iterable, Mapping
import re

import flax
import jax
from jax import lax
import jax.numpy as jnp
import optax

from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.parameters import Params


@flax.struct.dataclass
class TrainState:
  """Everything that a checkpoint holds, besides the position in the data.

  Attributes:
    step: int32 scalar, updates made so far.
    params: trained parameters only.
    ema: exponential moving average of `params`; `{}` where it is off.
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
    """The parameters to evaluate and to export."""
    return self.ema or self.params


def init_state(
  params: Params,
  tx: optax.GradientTransformation,
  ema: bool,
  extra: Callable[[Params], Params] = lambda params: {},
) -> TrainState:
  """The state before the first step; the average begins at the initial parameters."""
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
  params: Params,
  patterns: Iterable[str],
  *,
  sets: Mapping[str, tuple[str, ...]] = {},
  constants: Iterable[str] = (),
) -> tuple[Params, Params]:
  """(trained, held): a parameter is trained if any of the regular expressions is found
  in its dotted name.

  Args:
    params: by dotted name.
    patterns: regular expressions, or names of `sets`.
    sets: regular expressions by name.
    constants: regular expressions of what is never trained.

  Raises:
    ConfigError: a pattern is not a regular expression, or no name contains it.
  """
  trained = set()
  for pattern in (p for name in patterns for p in sets.get(name, (name,))):
    try:
      found = {name for name in params if re.search(pattern, name)}
    except re.error as error:
      raise ConfigError(
        f"trainable pattern '{pattern}' is not a regular expression: {error}"
      ) from error
    if not found:
      named = f'; sets are: {", ".join(sets)}' if sets else ''
      raise ConfigError(
        f"trainable pattern '{pattern}' matches no parameter; names look like "
        f"'{min(params)}'{named}"
      )
    trained |= {
      name
      for name in found
      if not any(re.search(constant, name) for constant in constants)
    }
  if not trained:
    raise ConfigError('config.trainable is empty: nothing would be trained')
  return (
    {name: x for name, x in params.items() if name in trained},
    {name: x for name, x in params.items() if name not in trained},
  )

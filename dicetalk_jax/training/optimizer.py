"""Makes an Optax optimizer from `config.optim`."""

from collections.abc import Mapping, Sequence
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from dicetalk_jax.errors import ConfigError

MUON_RATE = 2.0  # kernels learn at this times the rate of the rest
NAMES = ('adam', 'adamw', 'muon')
SCHEDULES = ('constant', 'cosine')


def make_schedule(optim: Any, total_steps: int) -> optax.Schedule:
  """Makes a linear warm-up over `optim.warmup` updates to `optim.lr`, then constant or
  a cosine to `optim.end_lr`.

  The schedule takes the number of updates already made; the first update has `lr /
  warmup`, not zero.
  """
  if optim.schedule not in SCHEDULES:
    raise ConfigError(
      f"unknown optim.schedule '{optim.schedule}'; choose one of: "
      f'{", ".join(SCHEDULES)}'
    )

  def schedule(count):
    warm = jnp.minimum(1.0, (count + 1) / max(optim.warmup, 1))
    if optim.schedule == 'constant':
      return optim.lr * warm
    progress = (count - optim.warmup) / max(total_steps - optim.warmup, 1)
    progress = jnp.clip(progress, 0.0, 1.0)
    cosine = 0.5 * (1 + jnp.cos(math.pi * progress))
    return (optim.end_lr + (optim.lr - optim.end_lr) * cosine) * warm

  return schedule


def make_optimizer(
  optim: Any, total_steps: int, new_modules: Sequence[str] = ()
) -> optax.GradientTransformation:
  """Chains clipping by global norm with Adam, AdamW or Muon.

  Weight decay acts on arrays of two or more dimensions (with Muon: on kernels).

  Muon (Jordan et al. 2024) orthogonalises the updates of all kernels, and leaves the
  rest to Adam with Nesterov momentum. It serves the small models that are trained from
  scratch.

  Args:
    optim: section of `configs/common.py`.
    total_steps: where the cosine ends.
    new_modules: patterns on names of parameters that learn at
      `optim.new_module_lr_mult` times the rate.

  Raises:
    ConfigError: an unknown name, betas that are not two, or a weight decay or a
      multiplier that would be ignored.
  """
  if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
    raise ConfigError(
      f'optim.betas={optim.betas} must be two numbers, at least 0 and less than 1'
    )
  update = _update_rule(optim, make_schedule(optim, total_steps))
  parts = []
  if optim.clip:
    parts.append(optax.clip_by_global_norm(optim.clip))
  parts.append(update)
  if optim.new_module_lr_mult != 1:
    if not new_modules:
      raise ConfigError(
        f'optim.new_module_lr_mult={optim.new_module_lr_mult}, but this task has no '
        'new modules: nothing would learn at that rate; set it to 1'
      )
    parts.append(_scale_matching(new_modules, optim.new_module_lr_mult))
  # A chain of one would have another state, and checkpoints hold the state.
  return optax.chain(*parts) if len(parts) > 1 else update


def _update_rule(optim: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
  b1, b2 = optim.betas
  if optim.name == 'adam':
    if optim.weight_decay:
      raise ConfigError(
        "optim.weight_decay needs optim.name='adamw'; 'adam' would ignore it"
      )
    return optax.adam(schedule, b1=b1, b2=b2, eps=optim.eps)
  if optim.name == 'adamw':
    return optax.adamw(
      schedule,
      b1=b1,
      b2=b2,
      eps=optim.eps,
      weight_decay=optim.weight_decay,
      mask=lambda params: {name: x.ndim > 1 for name, x in params.items()},
    )
  if optim.name == 'muon':
    return _stacked(
      optax.contrib.muon(
        lambda count: MUON_RATE * schedule(count),
        adam_learning_rate=schedule,
        adam_b1=b1,
        adam_b2=b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
      )
    )
  raise ConfigError(
    f"unknown optim.name '{optim.name}'; choose one of: {', '.join(NAMES)}"
  )


def _scale_matching(
  patterns: Sequence[str], factor: float
) -> optax.GradientTransformation:
  """Multiplies the updates of all parameters whose names match a pattern."""
  matching = re.compile('|'.join(patterns))

  def scale(updates, params):
    return {
      name: factor * x if matching.search(name) else x for name, x in updates.items()
    }

  return optax.stateless(scale)


def clear_moments(opt_state: Any, params: Any, name: str, rows: jax.Array) -> Any:
  """Sets to zero what the optimizer state holds for some rows of a parameter.

  Args:
    opt_state: state of an optimizer of `make_optimizer`.
    params: all trained parameters.
    name: of the parameter `[K,...]`.
    rows: bool `[K]`, the rows to clear.

  Returns:
    The new optimizer state.
  """
  groups = _groups(params)
  stack = next(key for key, names in groups.items() if name in names)
  place = groups[stack].index(name)

  def clear_rows(moment):
    mask = rows.reshape(-1, *[1] * (moment.ndim - 1))
    return jnp.where(mask, 0, moment)

  def clear(path, x):
    keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    innermost = keys[-1] if keys else None
    if innermost == name:
      return clear_rows(x)
    if innermost == stack:  # Muon's state is stacked
      return x.at[place].set(clear_rows(x[place]))
    return x

  return jax.tree.map_with_path(clear, opt_state)


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
  """Returns `min(decay, (1 + t) / (10 + t))`: an early EMA forgets the initial
  parameters quickly.
  """
  return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def _matrices(stacks: Mapping[str, jax.Array]) -> dict[str, Any]:
  """Says which stacks Muon treats as matrices: those of kernels, as inputs (all axes
  between) by outputs.
  """

  def dimension_numbers(x):
    inputs = tuple(range(1, x.ndim - 1))
    return optax.contrib.MuonDimensionNumbers(inputs, x.ndim - 1)

  return {
    key: dimension_numbers(x) if key.startswith('kernel') else None
    for key, x in stacks.items()
  }


def _groups(params: Mapping[str, Any]) -> dict[str, list[str]]:
  """Groups names of equal shape, kernels apart from the rest."""
  groups: dict[str, list[str]] = {}
  for name in sorted(params):
    kind = 'kernel' if name.endswith('kernel') else 'other'
    groups.setdefault(f'{kind} {params[name].shape}', []).append(name)
  return groups


def _stacked(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Applies `tx` to stacks of equal shape: Muon's iteration then compiles once per
  shape, not once per parameter.
  """

  def stack(params):
    return {
      key: jnp.stack([params[name] for name in names])
      for key, names in _groups(params).items()
    }

  def unstack(stacks, like):
    return {
      name: stacks[key][i]
      for key, names in _groups(like).items()
      for i, name in enumerate(names)
    }

  def init(params):
    return tx.init(stack(params))

  def update(updates, state, params=None):
    stacks = None if params is None else stack(params)
    new, state = tx.update(stack(updates), state, stacks)
    return unstack(new, updates), state

  return optax.GradientTransformation(init, update)

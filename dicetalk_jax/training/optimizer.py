"""From `config.optim` to Optax."""

from collections.abc import Sequence
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from dicetalk_jax.errors import ConfigError

MUON_RATE = 2.0  # kernels learn at this times the rate of the rest
SCHEDULES = ('constant', 'cosine')


def make_schedule(optim: Any, total_steps: int) -> optax.Schedule:
  """Linear warm-up over `optim.warmup` updates to `optim.lr`, then constant or a cosine
  to `optim.end_lr`.

  The argument counts the updates already made; the first update has `lr / warmup`, not
  zero.
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
    progress = jnp.clip(
      (count - optim.warmup) / max(total_steps - optim.warmup, 1), 0.0, 1.0
    )
    return (
      optim.end_lr + (optim.lr - optim.end_lr) * 0.5 * (1 + jnp.cos(math.pi * progress))
    ) * warm

  return schedule


def make_optimizer(
  optim: Any, total_steps: int, new_modules: Sequence[str] = ()
) -> optax.GradientTransformation:
  """Clipping by global norm, then Adam, AdamW or Muon; decay acts on arrays of two or
  more dimensions (with Muon: on kernels).

  Muon (Jordan et al. 2024) orthogonalises the updates of all kernels, and leaves the
  rest to Adam with Nesterov momentum. It serves the small models that learn from
  nothing.

  Args:
    optim: `name` ('adam' | 'adamw' | 'muon'), `lr`, `betas`, `eps`, `weight_decay`,
      `clip` (0 = off), `warmup`, `schedule`, `end_lr`, `new_module_lr_mult`.
    total_steps: where the cosine ends.
    new_modules: patterns on names of parameters that learn at `new_module_lr_mult`
      times the rate.

  Raises:
    ConfigError: an unknown name, betas that are not two, or a weight decay or a
      multiplier that would be ignored.
  """
  schedule = make_schedule(optim, total_steps)
  if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
    raise ConfigError(
      f'optim.betas={optim.betas} must be two numbers, at least 0 and less than 1'
    )
  moments = dict(zip(('b1', 'b2'), optim.betas), eps=optim.eps)
  if optim.name == 'adam':
    if optim.weight_decay:
      raise ConfigError(
        "optim.weight_decay needs optim.name='adamw'; 'adam' would ignore it"
      )
    update = optax.adam(schedule, **moments)
  elif optim.name == 'adamw':
    update = optax.adamw(
      schedule,
      **moments,
      weight_decay=optim.weight_decay,
      mask=lambda params: {name: x.ndim > 1 for name, x in params.items()},
    )
  elif optim.name == 'muon':
    update = _stacked(
      optax.contrib.muon(
        lambda count: MUON_RATE * schedule(count),
        adam_learning_rate=schedule,
        adam_b1=optim.betas[0],
        adam_b2=optim.betas[1],
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
      )
    )
  else:
    raise ConfigError(
      f"unknown optim.name '{optim.name}'; choose one of: adam, adamw, muon"
    )
  parts = [optax.clip_by_global_norm(optim.clip)] if optim.clip else []
  parts.append(update)
  if optim.new_module_lr_mult != 1:
    if not new_modules:
      raise ConfigError(
        f'optim.new_module_lr_mult={optim.new_module_lr_mult}, but this task has no '
        'new modules: nothing would learn at that rate; set it to 1'
      )
    parts.append(_faster(new_modules, optim.new_module_lr_mult))
  return optax.chain(*parts) if len(parts) > 1 else update


def _faster(patterns: Sequence[str], factor: float) -> optax.GradientTransformation:
  new = re.compile('|'.join(patterns))
  return optax.stateless(
    lambda updates, params: {
      name: factor * x if new.search(name) else x for name, x in updates.items()
    }
  )


def clear_moments(opt_state: Any, params: Any, name: str, rows: jax.Array) -> Any:
  """The optimizer state with zeros in the rows (bool `[K]`) of what it holds for
  parameter `name` `[K,...]`.
  """
  stack, names = next(
    (key, names) for key, names in _groups(params).items() if name in names
  )

  def clear(path, x):
    key = next(
      (
        entry.key
        for entry in reversed(path)
        if isinstance(entry, jax.tree_util.DictKey)
      ),
      None,
    )

    def blank(moment):
      return jnp.where(rows.reshape(-1, *[1] * (moment.ndim - 1)), 0, moment)

    if key == name:
      return blank(x)
    return (
      x.at[names.index(name)].set(blank(x[names.index(name)])) if key == stack else x
    )

  return jax.tree.map_with_path(clear, opt_state)


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
  """`min(decay, (1 + t) / (10 + t))`: early averages forget the initial parameters
  quickly.
  """
  return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def _matrices(stacks: Any) -> Any:
  """Which stacks Muon treats as matrices: those of kernels, as inputs (all axes
  between) by outputs.
  """

  def numbers(x):
    return optax.contrib.MuonDimensionNumbers(tuple(range(1, x.ndim - 1)), x.ndim - 1)

  return {
    key: numbers(x) if key.startswith('kernel') else None for key, x in stacks.items()
  }


def _groups(params: Any) -> dict[str, list[str]]:
  """Names of equal shape, kernels apart from the rest."""
  names: dict[str, list[str]] = {}
  for name in sorted(params):
    kind = 'kernel' if name.endswith('kernel') else 'other'
    names.setdefault(f'{kind} {params[name].shape}', []).append(name)
  return names


def _stacked(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` on stacks of equal shape: Muon's iteration then compiles once per shape,
  not once per parameter.
  """

  def stack(params):
    return {
      key: jnp.stack([params[name] for name in names])
      for key, names in _groups(params).items()
    }

  def update(updates, state, params=None):
    stacks, state = tx.update(
      stack(updates), state, None if params is None else stack(params)
    )
    return {
      name: stacks[key][i]
      for key, names in _groups(updates).items()
      for i, name in enumerate(names)
    }, state

  return optax.GradientTransformation(lambda params: tx.init(stack(params)), update)

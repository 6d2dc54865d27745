"""From `config.optim` to Optax."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from dicetalk_jax.errors import ConfigError

MUON_RATE = 2.0  # kernels learn at this times the rate of the rest
SCHEDULES = ('constant', 'cosine')


def make_schedule(optim: Any, total_steps: int) -> optax.Schedule:
  """Linear warm-up over `optim.warmup` updates to `optim.lr`, then constant or a cosine to `optim.end_lr`.

  The argument counts the updates already made; the first update has `lr / warmup`, not zero.
  """
  if optim.schedule not in SCHEDULES:
    raise ConfigError(f"unknown optim.schedule '{optim.schedule}'; choose one of: {', '.join(SCHEDULES)}")

  def schedule(count):
    warm = jnp.minimum(1.0, (count + 1) / max(optim.warmup, 1))
    if optim.schedule == 'constant':
      return optim.lr * warm
    progress = jnp.clip((count - optim.warmup) / max(total_steps - optim.warmup, 1), 0.0, 1.0)
    return (optim.end_lr + (optim.lr - optim.end_lr) * 0.5 * (1 + jnp.cos(math.pi * progress))) * warm

  return schedule


def make_optimizer(optim: Any, total_steps: int) -> optax.GradientTransformation:
  """Clipping by global norm, then Adam, AdamW or Muon; decay acts on arrays of two or more dimensions
  (with Muon: on kernels).

  Muon (Jordan et al. 2024) orthogonalises the updates of all kernels, and leaves the rest to Adam with Nesterov
  momentum. It serves the small models that learn from nothing.

  Args:
    optim: `name` ('adam' | 'adamw' | 'muon'), `lr`, `betas`, `eps`, `weight_decay`, `clip` (0 = off), `warmup`,
      `schedule`, `end_lr`.
    total_steps: where the cosine ends.

  Raises:
    ConfigError: an unknown name, or a weight decay that the optimizer would ignore.
  """
  schedule = make_schedule(optim, total_steps)
  moments = dict(zip(('b1', 'b2'), optim.betas), eps=optim.eps)
  if optim.name == 'adam':
    if optim.weight_decay:
      raise ConfigError("optim.weight_decay needs optim.name='adamw'; 'adam' would ignore it")
    update = optax.adam(schedule, **moments)
  elif optim.name == 'adamw':
    update = optax.adamw(schedule, **moments, weight_decay=optim.weight_decay,
                         mask=lambda params: {name: x.ndim > 1 for name, x in params.items()})
  elif optim.name == 'muon':
    update = optax.contrib.muon(
        lambda count: MUON_RATE * schedule(count), adam_learning_rate=schedule, adam_b1=optim.betas[0],
        adam_b2=optim.betas[1], eps=optim.eps, weight_decay=optim.weight_decay, consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices)
  else:
    raise ConfigError(f"unknown optim.name '{optim.name}'; choose one of: adam, adamw, muon")
  return optax.chain(optax.clip_by_global_norm(optim.clip), update) if optim.clip else update


def ema_decay(decay: float, step: jax.Array) -> jax.Array:
  """`min(decay, (1 + t) / (10 + t))`: early averages forget the initial parameters quickly."""
  return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def _matrices(params: Any) -> Any:
  """Which parameters Muon treats as matrices: every kernel, as inputs (all axes but the last) by outputs."""
  numbers = lambda x: optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)
  return {name: numbers(x) if name.endswith('kernel') else None for name, x in params.items()}

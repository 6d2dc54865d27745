"""One training step: a jitted pure function of (state, frozen, batch, key)."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

from dicetalk_jax.models import target
from dicetalk_jax.models.parameters import Params
from dicetalk_jax.parallel import BATCH_AXES
from dicetalk_jax.training.optimizer import ema_decay
from dicetalk_jax.training.state import TrainState

# (trained, frozen, batch, key, step) -> (mean loss, parts to log)
Loss = Callable[
  [Params, Params, Any, jax.Array, jax.Array], tuple[jax.Array, dict[str, Any]]
]
# (state, rows, key) -> (state, more to log)
AfterUpdate = Callable[
  [TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]
]
TrainStep = Callable[
  [TrainState, Params, Any, jax.Array], tuple[TrainState, dict[str, jax.Array]]
]

# Folded into a step's key for what follows the update. No micro-batch has this number.
UPDATE = 2**31 - 1


def make_train_step(
  loss_fn: Loss,
  tx: optax.GradientTransformation,
  state_shardings: TrainState,
  *,
  accum: int = 1,
  ema: float = 0.0,
  after_update: AfterUpdate = lambda state, rows, key: (state, {}),
) -> TrainStep:
  """Compiles `train_step(state, frozen, batch, key) -> (state, metrics)`.

  Call it with the mesh set. The state is donated. `key` is the same for all steps: the
  step's own key is `fold_in(key, state.step)`, and of micro-batch i `fold_in(that, i)`.
  Metrics are `loss`, the parts of the loss, and `grad_norm` before clipping.

  Args:
    loss_fn: a mean over the rows of its batch; gathers what it reads of the parameters
      (`gathering`).
    tx: the optimizer.
    state_shardings: `parallel.shardings` of the state.
    accum: micro-batches per step; memory for activations falls by this factor.
    ema: final decay of the EMA; 0 if the state has none.
    after_update: see `Task.after_update`.
  """

  def value_and_grad(trained, *args):
    value, grads = jax.value_and_grad(loss_fn, has_aux=True)(trained, *args)
    return value, lax.with_sharding_constraint(grads, state_shardings.params)

  def accumulated(trained, frozen, batch, key, step):
    # 1. Split the batch with a stride: each device keeps its own rows, no data moves.
    def split(x):
      return x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1)

    micro_batches = jax.tree.map(split, batch)
    micro_batches = lax.with_sharding_constraint(micro_batches, P(None, BATCH_AXES))

    # 2. Add up the gradients.
    def add_gradients(total, xs):
      i, micro_batch = xs
      own_key = jax.random.fold_in(key, i)
      # Parameters wait for the micro-batch. Otherwise a compiler may gather all of them
      # before the loop.
      inputs = lax.optimization_barrier((trained, frozen, micro_batch))
      value, grads = value_and_grad(*inputs, own_key, step)
      return jax.tree.map(jnp.add, total, grads), value

    zeros = jax.tree.map(jnp.zeros_like, trained)
    total, values = lax.scan(add_gradients, zeros, (jnp.arange(accum), micro_batches))
    grads = jax.tree.map(lambda x: x / accum, total)

    # 3. Average what is logged, and join the rows.
    loss, parts = values
    rows = parts.pop('per_row', {})
    rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in rows.items()}
    loss, parts = jax.tree.map(lambda x: x.mean(0), (loss, parts))
    return (loss, parts | {'per_row': rows}), grads

  def train_step(state, frozen, batch, key):
    key = jax.random.fold_in(key, state.step)

    # 1. Loss and gradient
    gradient = value_and_grad if accum == 1 else accumulated
    (loss, parts), grads = gradient(state.params, frozen, batch, key, state.step)
    rows = parts.pop('per_row', {})

    # 2. Update
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    # 3. EMA
    average = state.ema
    if ema:
      decay = ema_decay(ema, state.step)
      average = optax.incremental_update(params, average, 1 - decay)

    # 4. What no gradient moves
    state = TrainState(
      step=state.step + 1,
      params=params,
      ema=average,
      opt_state=opt_state,
      extra=state.extra,
    )
    state, more = after_update(state, rows, jax.random.fold_in(key, UPDATE))

    metrics = {'loss': loss, **parts, **more, 'grad_norm': optax.tree.norm(grads)}
    return state, metrics

  replicated = state_shardings.step
  return jax.jit(
    train_step,
    donate_argnums=0,
    out_shardings=(state_shardings, replicated),
    compiler_options=target.compiler_options(),
  )

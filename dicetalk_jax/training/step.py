"""One training step: a jitted pure function of (state, frozen, batch, key)."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

from dicetalk_jax.models.parameters import Params
from dicetalk_jax.parallel import BATCH_AXES
from dicetalk_jax.training.optimizer import ema_decay
from dicetalk_jax.training.state import TrainState

# (params, frozen, batch, key, step) -> (mean loss, parts to log)
Loss = Callable[
  [Params, Any, Any, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]
]
# (state, rows, key) -> (state, more to log)
AfterUpdate = Callable[
  [TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]
]
UPDATE = (
  2**31 - 1
  # folded into a step's key for what follows the update; no micro-batch has this number
)


def make_train_step(
  loss_fn: Loss,
  tx: optax.GradientTransformation,
  state_shardings: TrainState,
  *,
  accum: int = 1,
  ema: float = 0.0,
  after_update: AfterUpdate = lambda state, rows, key: (state, {}),
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Compiles `train_step(state, frozen, batch, key) -> (state, metrics)`; call it with
  the mesh set.

  The state is donated. `key` is the same for all steps: the step's own key is
  `fold_in(key, state.step)`, and of micro-batch i `fold_in(that, i)`. Metrics are
  `loss`, the parts of the loss, and `grad_norm` before clipping.

  Args:
    loss_fn: a mean over the rows of its batch.
    tx: the optimizer.
    state_shardings: `parallel.shardings` of the state.
    accum: micro-batches per step; memory for activations falls by this factor.
    ema: final decay of the moving average; 0 where the state has none.
    after_update: see `Task.after_update`.
  """

  def whole_loss(params, frozen, *args):
    # Gathered here, or their layout would spread to activations, which would then be
    # sent around in every layer.
    def whole(tree):
      return jax.tree.map(lambda x: lax.with_sharding_constraint(x, P()), tree)

    return loss_fn(whole(params), whole(frozen), *args)

  def value_and_grad(params, *args):
    value, grads = jax.value_and_grad(whole_loss, has_aux=True)(params, *args)
    return value, lax.with_sharding_constraint(grads, state_shardings.params)

  def accumulated(params, frozen, batch, key, step):
    # Strided split: each device keeps its own rows, so no data moves.
    micro = jax.tree.map(
      lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1), batch
    )
    micro = lax.with_sharding_constraint(micro, P(None, BATCH_AXES))

    def body(total, xs):
      i, part = xs
      metrics, grads = value_and_grad(
        params, frozen, part, jax.random.fold_in(key, i), step
      )
      return jax.tree.map(jnp.add, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, metrics = lax.scan(body, zeros, (jnp.arange(accum), micro))
    loss, parts = metrics
    rows = {
      name: x.reshape(-1, *x.shape[2:]) for name, x in parts.pop('per_row', {}).items()
    }
    loss, parts = jax.tree.map(lambda x: x.mean(0), (loss, parts))
    return (loss, parts | {'per_row': rows}), jax.tree.map(lambda x: x / accum, grads)

  def train_step(state: TrainState, frozen, batch, key):
    key = jax.random.fold_in(key, state.step)
    gradient = value_and_grad if accum == 1 else accumulated
    (loss, parts), grads = gradient(state.params, frozen, batch, key, state.step)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.ema
    if ema:
      average = optax.incremental_update(
        params, state.ema, 1 - ema_decay(ema, state.step)
      )
    rows = parts.pop('per_row', {})
    state, more = after_update(
      TrainState(state.step + 1, params, average, opt_state, state.extra),
      rows,
      jax.random.fold_in(key, UPDATE),
    )
    return state, {'loss': loss, **parts, **more, 'grad_norm': optax.tree.norm(grads)}

  replicated = state_shardings.step
  return jax.jit(
    train_step, donate_argnums=0, out_shardings=(state_shardings, replicated)
  )

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dicetalk_jax import parallel
from dicetalk_jax.training import gathering
from dicetalk_jax.training.state import init_state
from dicetalk_jax.training.step import make_train_step

PARAMS = {
  'a.kernel': np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32),
  'a.bias': np.zeros(64, np.float32),
}
FROZEN = {'target': np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)}
BATCH = {'x': np.random.default_rng(2).normal(size=(32, 64)).astype(np.float32)}


def loss_fn(params, frozen, batch, key, step):
  out = jnp.tanh(batch['x'] @ params['a.kernel'] + params['a.bias'])
  error = ((out - batch['x'] @ frozen['target']) ** 2).mean(-1)
  return error.mean(), {'rows': error.mean(), 'step': jnp.float32(step)}


def noisy_loss(params, frozen, batch, key, step):
  noise = jax.random.normal(key, batch['x'].shape)
  return loss_fn(params, frozen, {'x': batch['x'] + noise}, key, step)


ADAM, SGD = optax.adam(1e-2), optax.sgd(1.0)


@functools.lru_cache
def compiled(mesh, loss, tx, accum, ema):
  """(fresh state maker, step), as the loop makes them."""
  create = functools.partial(init_state, tx=tx, ema=bool(ema))
  shards = parallel.shardings(jax.eval_shape(create, PARAMS), mesh)
  return jax.jit(create, out_shardings=shards), make_train_step(
    loss, tx, shards, accum=accum, ema=ema
  )


def run(mesh, loss=loss_fn, tx=ADAM, *, accum=1, ema=0.5, steps=1, key=0):
  with jax.set_mesh(mesh):
    create, step = compiled(mesh, loss, tx, accum, ema)
    state = create(parallel.put_params(PARAMS, mesh))
    frozen, batch = parallel.put_params(FROZEN, mesh), parallel.put_batch(BATCH, mesh)
    losses = []
    for _ in range(steps):
      state, metrics = step(state, frozen, batch, jax.random.key(key))
      losses.append(float(metrics['loss']))
  return state, metrics, losses


def test_accumulation_equals_the_full_batch(mesh):
  # Plain gradient descent: the change of the parameters is the gradient.
  full, metrics, _ = run(mesh, tx=SGD)
  parts, metrics4, _ = run(mesh, tx=SGD, accum=4)
  for name in ('loss', 'rows', 'grad_norm'):
    np.testing.assert_allclose(metrics4[name], metrics[name], rtol=2e-6)
  for name in PARAMS:
    np.testing.assert_allclose(
      parts.params[name], full.params[name], rtol=1e-5, atol=1e-6
    )


def test_micro_batches_draw_other_noise(mesh):
  def noise_only(params, frozen, batch, key, step):
    return jax.random.normal(key, ()) + 0 * params['a.bias'].sum(), {}

  draws = [
    jax.random.normal(
      jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), i), ()
    )
    for i in range(4)
  ]
  np.testing.assert_allclose(
    run(mesh, noise_only, accum=4)[1]['loss'], np.mean(draws), rtol=1e-6
  )


def test_frozen_and_untrained_have_no_optimizer_state(mesh):
  state, _, _ = run(mesh)
  names = {
    str(path[-1].key)
    for path, _ in jax.tree.leaves_with_path(state)
    if hasattr(path[-1], 'key')
  }
  assert names == set(PARAMS)


def test_state_is_sharded_alike_and_donated(mesh):
  create, step = compiled(mesh, loss_fn, ADAM, 1, 0.5)
  state = create(parallel.put_params(PARAMS, mesh))
  new, _ = step(
    state,
    parallel.put_params(FROZEN, mesh),
    parallel.put_batch(BATCH, mesh),
    jax.random.key(0),
  )
  assert all(x.is_deleted() for x in jax.tree.leaves(state))
  moments = new.opt_state[0]
  for tree in (new.params, new.ema, moments.mu, moments.nu):
    assert tree['a.kernel'].addressable_shards[0].data.shape == (16, 64)
    assert tree['a.bias'].addressable_shards[0].data.shape == (64,)


def test_ema_follows_its_formula(mesh):
  state, _, _ = run(mesh, tx=SGD, ema=0.999)
  decay = 0.1  # (1 + 0) / (10 + 0)
  for name, x in PARAMS.items():
    np.testing.assert_allclose(
      state.ema[name],
      decay * x + (1 - decay) * state.params[name],
      rtol=1e-5,
      atol=1e-6,
    )


def test_without_ema_the_parameters_are_evaluated(mesh):
  state, _, _ = run(mesh, ema=0.0)
  assert state.ema == {} and state.averaged is state.params


def test_randomness_is_a_function_of_seed_and_step(mesh):
  first, again, other = (
    run(mesh, noisy_loss, steps=2, key=key)[2] for key in (0, 0, 1)
  )
  assert first == again
  assert first[0] != first[1] and first[0] != other[0]


def test_device_count_changes_only_rounding(mesh):
  one = parallel.make_mesh(devices=jax.devices()[:1])
  losses = [run(m, noisy_loss, accum=2, steps=4)[2] for m in (mesh, one)]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def attention_loss(params, frozen, batch, key, step):
  """Half a transformer: the sharded side of its weights is a head's, if nothing
  hinders it.
  """
  params, frozen = jax.tree.map(gathering.gather, (params, frozen))
  x = batch['x'].reshape(-1, 4, 16)
  q, k, v = ((x @ params[name]).reshape(*x.shape[:2], 8, -1) for name in 'qkv')
  y = jax.nn.dot_product_attention(q, k, v)
  return jnp.square(y.reshape(*x.shape[:2], -1) @ frozen['out'] - x).mean(), {}


def test_the_layout_of_parameters_does_not_reach_activations():
  """Devices exchange parameters and gradients, and no activations: nothing goes from
  all to all.
  """
  mesh = parallel.make_mesh(fsdp=8, devices=jax.devices()[:8])
  params = {name: np.zeros((16, 256), np.float32) for name in 'qkv'}
  frozen = {'out': np.zeros((256, 16), np.float32)}
  with jax.set_mesh(mesh):
    create = functools.partial(init_state, tx=ADAM, ema=False)
    shards = parallel.shardings(jax.eval_shape(create, params), mesh)
    assert shards.params['q'].spec == jax.P(None, 'fsdp')
    state = jax.jit(create, out_shardings=shards)(parallel.put_params(params, mesh))
    step = make_train_step(attention_loss, ADAM, shards)
    program = step.lower(
      state,
      parallel.put_params(frozen, mesh),
      parallel.put_batch(BATCH, mesh),
      jax.random.key(0),
    )
  text = program.compile().as_text()
  assert text.count(' all-gather(') + text.count(' all-gather-start(') == 4
  assert 'all-to-all' not in text and 'collective-permute' not in text


def test_step_is_compiled_once_whatever_the_task_adds_to_the_state():
  """A weak type, as of `jnp.full(4, 1 / 4)`, would not survive the first step."""

  def extra(params):
    return {'usage': jnp.full(4, 1 / 4)}

  new_state = functools.partial(init_state, tx=ADAM, ema=True, extra=extra)
  target = jax.eval_shape(new_state, PARAMS)
  assert not any(x.weak_type for x in jax.tree.leaves(target))
  mesh = parallel.make_mesh(devices=jax.devices()[:1])

  def after_update(state, rows, key):
    usage = 0.9 * state.extra['usage'] + jnp.ones(4, jnp.float32)
    return state.replace(extra={'usage': usage}), {}

  with jax.set_mesh(mesh):
    shards = parallel.shardings(target, mesh)
    step = make_train_step(loss_fn, ADAM, shards, ema=0.9, after_update=after_update)
    state = jax.jit(new_state, out_shardings=shards)(PARAMS)
    for _ in range(3):
      state, _ = step(state, FROZEN, BATCH, jax.random.key(0))
  assert step._cache_size() == 1

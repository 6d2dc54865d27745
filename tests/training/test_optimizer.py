import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from dicetalk_jax.errors import ConfigError
from dicetalk_jax.training.optimizer import (
  clear_moments,
  ema_decay,
  make_optimizer,
  make_schedule,
)
from dicetalk_jax.training.state import partition


def optim(**changes):
  config = ml_collections.ConfigDict(
    dict(
      name='adam',
      lr=0.1,
      betas=(0.8, 0.9),
      eps=1e-8,
      weight_decay=0.0,
      clip=0.0,
      warmup=0,
      schedule='constant',
      end_lr=0.0,
      ema=0.99,
      new_module_lr_mult=1.0,
    )
  )
  config.update(changes)
  return config


def test_schedule_warms_up_from_the_first_update():
  schedule = make_schedule(optim(warmup=4), 100)
  np.testing.assert_allclose(
    [schedule(t) for t in (0, 1, 3, 4, 99)], [0.025, 0.05, 0.1, 0.1, 0.1], rtol=1e-6
  )


def test_cosine_ends_at_end_lr():
  schedule = make_schedule(optim(warmup=10, schedule='cosine', end_lr=0.02), 110)
  np.testing.assert_allclose(
    [schedule(t) for t in (10, 60, 110, 500)], [0.1, 0.06, 0.02, 0.02], rtol=1e-6
  )


def test_adam_by_hand():
  """Kingma and Ba, algorithm 1, in float64."""
  tx = make_optimizer(optim(), 10)
  params = {'w': jnp.array([1.0, -2.0])}
  state = tx.init(params)
  m = v = np.zeros(2)
  expected = np.array([1.0, -2.0])
  for t, g in enumerate(np.array([[0.3, 0.1], [-0.2, 0.4], [0.5, 0.5]]), 1):
    updates, state = tx.update({'w': jnp.array(g, jnp.float32)}, state, params)
    params = optax.apply_updates(params, updates)
    m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
    expected = expected - 0.1 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
    np.testing.assert_allclose(params['w'], expected, rtol=1e-5)


def test_decay_spares_vectors():
  tx = make_optimizer(optim(name='adamw', weight_decay=0.5), 10)
  params = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  np.testing.assert_allclose(updates['kernel'], -0.05, rtol=1e-6)
  np.testing.assert_array_equal(updates['bias'], 0)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
  tx = make_optimizer(optim(name='muon', lr=0.1), 10)
  grads = {
    'conv.kernel': jax.random.normal(jax.random.key(0), (3, 3, 4, 6)),
    'conv.bias': jnp.array([0.3, -5.0]),
  }
  params = jax.tree.map(jnp.zeros_like, grads)
  updates, _ = tx.update(grads, tx.init(params), params)
  singular = np.linalg.svd(
    np.reshape(updates['conv.kernel'], (36, 6)), compute_uv=False
  )
  assert (
    singular.max() / singular.min()
    < 2
    < np.linalg.cond(np.reshape(grads['conv.kernel'], (36, 6))) + 0.5
  )
  np.testing.assert_allclose(
    np.sqrt(np.mean(np.square(updates['conv.kernel']))), 2 * 0.1 * 0.2, rtol=0.2
  )
  nadam = optax.nadam(0.1, b1=0.8, b2=0.9)
  expected, _ = nadam.update(grads, nadam.init(params))
  np.testing.assert_allclose(updates['conv.bias'], expected['conv.bias'], rtol=1e-4)


def test_muon_treats_kernels_of_equal_shape_apart():
  tx = make_optimizer(optim(name='muon', lr=0.1), 10)
  small, large = (
    s * jax.random.normal(jax.random.key(i), (8, 6)) for i, s in enumerate((1e-3, 1.0))
  )

  def first_update(grads):
    return tx.update(grads, tx.init(grads), jax.tree.map(jnp.zeros_like, grads))[0]

  together = first_update({'a.kernel': small, 'b.kernel': large})
  for name, grad in (('a.kernel', small), ('b.kernel', large)):
    np.testing.assert_allclose(
      together[name], first_update({name: grad})[name], rtol=1e-4, atol=1e-6
    )


def test_clip_makes_large_gradients_alike():
  tx = make_optimizer(optim(clip=1.0, eps=1.0), 10)
  params = {'w': jnp.zeros(2)}
  updates = [
    tx.update({'w': jnp.array([3.0, 4.0]) * k}, tx.init(params), params)[0]['w']
    for k in (1.0, 100.0)
  ]
  np.testing.assert_allclose(*updates, rtol=1e-6)


def test_new_modules_learn_at_their_own_rate():
  params = {
    'old.kernel': jnp.ones((3, 3)),
    'new.kernel': jnp.ones((3, 3)),
    'new.bias': jnp.ones(3),
  }
  plain, faster = (
    make_optimizer(optim(new_module_lr_mult=mult), 10, (r'^new\.',))
    for mult in (1.0, 5.0)
  )
  (expected, _), (updates, _) = (
    tx.update(params, tx.init(params), params) for tx in (plain, faster)
  )
  for key, factor in (('old.kernel', 1), ('new.kernel', 5), ('new.bias', 5)):
    np.testing.assert_allclose(updates[key], factor * expected[key], rtol=1e-6)


@pytest.mark.parametrize('name', ['adam', 'muon'])
def test_moments_of_some_rows_are_cleared(name):
  """Two moments of `b.codes`, wherever the optimizer keeps them, and no other
  number.
  """
  params = {
    'a.codes': jnp.ones((4, 3)),
    'b.codes': jnp.ones((4, 3)),
    'c.kernel': jnp.ones((4, 3)),
  }
  state = jax.tree.map(
    jnp.ones_like, make_optimizer(optim(name=name, clip=1.0), 10).init(params)
  )
  rows = jnp.array([True, False, False, True])
  both = [clear_moments(state, params, codes, rows) for codes in ('a.codes', 'b.codes')]

  def zeros(state):
    return sum(int((x == 0).sum()) for x in jax.tree.leaves(state))

  assert [zeros(cleared) for cleared in both] == [2 * 2 * 3] * 2
  assert zeros(clear_moments(both[0], params, 'b.codes', rows)) == 4 * 2 * 3
  for x in jax.tree.leaves(both[1]):
    for moment in x if x.ndim > 2 else [x]:  # Muon's are stacked
      assert not (moment == 0).any() or (np.asarray(moment == 0).all(-1) == rows).all()


@pytest.mark.parametrize(
  'changes',
  [
    {'name': 'sgd'},
    {'schedule': 'linear'},
    {'weight_decay': 0.1},
    {'new_module_lr_mult': 5.0},
  ],
)
def test_impossible_settings(changes):
  with pytest.raises(ConfigError, match='|'.join(changes)):
    make_optimizer(optim(**changes), 10)


def test_ema_decay_grows_to_its_limit():
  assert [float(ema_decay(0.99, t)) for t in (0, 8)] == pytest.approx([0.1, 0.5])
  assert float(ema_decay(0.99, 10_000)) == pytest.approx(0.99)


def test_partition_by_patterns():
  params = {'unet.attn.to_k': 1, 'unet.conv.kernel': 2, 'pose.conv.kernel': 3}
  trained, held = partition(params, (r'^pose', r'to_k$'))
  assert trained == {'unet.attn.to_k': 1, 'pose.conv.kernel': 3}
  assert held == {'unet.conv.kernel': 2}


def test_partition_by_sets_and_constants():
  params = {'net.kernel': 1, 'net.mean': 2, 'other.kernel': 3}
  sets = {'all': ('.*',), 'net': ('^net', 'kernel$')}
  assert set(partition(params, ('all',), sets=sets, constants=('mean$',))[1]) == {
    'net.mean'
  }
  assert set(partition(params, ('net',), sets=sets)[0]) == set(params)
  with pytest.raises(
    ConfigError, match="'nets' matches no parameter.*sets are: all, net"
  ):
    partition(params, ('nets',), sets=sets)


@pytest.mark.parametrize('patterns', [(), ('nothing',), ('(',), ('pose', 'nothing')])
def test_patterns_that_train_nothing(patterns):
  with pytest.raises(ConfigError):
    partition({'pose.kernel': 1}, patterns)

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from dicetalk_jax.data import clip_record
from dicetalk_jax.data.feature_store import FeatureStore
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.training import codebook
from dicetalk_jax.training.state import init_state


def test_codes_begin_where_the_priors_are(tmp_path):
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(4, 6)).astype(np.float32) * 5
  priors = FeatureStore(tmp_path, 'set').write(
    'prior',
    'embedder',
    (
      (i, np.stack([centres[i % 4], np.full(6, 0.05, np.float32)])[None])
      for i in range(12)
    ),
  )
  parts = [DatasetPart(None, {'prior': priors}, weight=1.0)]
  params = {
    'codebook.fc.kernel': rng.normal(size=(6, 8)).astype(np.float32),
    'codebook.fc.bias': rng.normal(size=8).astype(np.float32),
    'codebook.codebook.embedding': np.zeros((4, 8), np.float32),
    'emo_linear.kernel': np.ones(3),
  }
  fitted = codebook.fit_codes(params, parts, seed=3)
  projected = centres @ params['codebook.fc.kernel'] + params['codebook.fc.bias']
  distance = np.linalg.norm(
    projected[:, None] - fitted['codebook.codebook.embedding'], axis=-1
  )
  assert sorted(distance.argmin(1)) == [0, 1, 2, 3] and distance.min(1).max() < 0.1
  assert fitted['emo_linear.kernel'] is params['emo_linear.kernel']
  again = codebook.fit_codes(params, parts, seed=3)
  np.testing.assert_array_equal(
    again['codebook.codebook.embedding'], fitted['codebook.codebook.embedding']
  )


K, D, B = 3, 2, 6


def settings(restart=0, update='grad'):
  return ml_collections.ConfigDict(
    dict(
      trainable=('all',),
      emo_model=dict(
        codebook_update=update, codebook_size=K, num_classes=22, mode='bank'
      ),
      emotion=dict(bank_decay=0.9, restart=restart),
    )
  )


@functools.cache
def compiled(**options):
  """Compiles `codebook.after_update` with the given settings."""
  return jax.jit(lambda *args: codebook.after_update(*args, settings(**options)))


def start(step=1, usage=(), **options):
  """A state with moments of ones, and averages of zeros."""
  params = {codebook.CODES: np.arange(6.0).reshape(K, D), 'other': np.ones((K, D))}
  state = init_state(
    params,
    optax.adam(1.0),
    True,
    lambda params: codebook.extra_state(params, settings(**options)),
  )
  extra = state.extra | ({'bank.usage': np.float32(usage)} if usage else {})
  return state.replace(
    step=np.int32(step),
    opt_state=jax.tree.map(np.ones_like, state.opt_state),
    extra=extra,
    ema=jax.tree.map(np.zeros_like, state.ema),
  )


ROWS = {
  'code': jnp.array([0, 0, 0, 2, 2, 0]),
  'z': jnp.float32(np.random.default_rng(0).normal(size=(B, D))),
  'emotion_class': jnp.array([1, 2, 3, 0, -1, 19]),
}  # three levels of angry, neutral, unknown, surprised


def test_usage_and_purity_are_followed():
  state, metrics = compiled()(start(), ROWS, jax.random.key(0))
  usage = 0.9 / 3 + 0.1 * np.array([4, 0, 2]) / 6
  np.testing.assert_allclose(state.extra['bank.usage'], usage, rtol=1e-6)
  np.testing.assert_allclose(
    metrics['bank_perplexity'], np.exp(-(usage * np.log(usage)).sum()), rtol=1e-6
  )
  np.testing.assert_allclose(
    metrics['bank_purity'], 4 / 5, rtol=1e-6
  )  # angry of code 0, neutral of code 2
  np.testing.assert_array_equal(
    state.params[codebook.CODES], np.arange(6).reshape(K, D)
  )


def test_classes_are_counted_by_emotion():
  numbers = {
    emotion: {
      int(codebook._emotion(clip_record.emotion_class(emotion, level)))
      for level in (0, *clip_record.LEVELS)
    }
    for emotion in clip_record.EMOTIONS
  }
  assert all(len(of_emotion) == 1 for of_emotion in numbers.values())
  assert set.union(*numbers.values()) == set(range(len(clip_record.EMOTIONS)))


def test_averaged_codes_are_means_of_their_priors():
  state, _ = compiled(update='ema')(start(update='ema'), ROWS, jax.random.key(0))
  z, codes = np.float64(ROWS['z']), np.arange(6.0).reshape(K, D)
  for k, served in enumerate(([0, 1, 2, 5], [], [3, 4])):
    total, count = (
      0.9 * codes[k] / 3 + 0.1 * z[served].sum(0) / B,
      0.9 / 3 + 0.1 * len(served) / B,
    )
    np.testing.assert_allclose(
      state.params[codebook.CODES][k], total / count, rtol=1e-5
    )
  for _ in range(200):
    state, _ = compiled(update='ema')(state, ROWS, jax.random.key(0))
  np.testing.assert_allclose(state.params[codebook.CODES][2], z[3:5].mean(0), rtol=1e-4)
  np.testing.assert_allclose(
    state.params[codebook.CODES][1], codes[1], rtol=1e-4
  )  # serves nobody: stays


@pytest.mark.parametrize('update', ['grad', 'ema'])
def test_rare_codes_begin_anew_at_a_prior(update):
  options = dict(restart=100, update=update)
  for step in (99, 100):
    before = start(step, (0.7, 0.03, 0.27), **options)
    state, _ = compiled(**options)(before, ROWS, jax.random.key(0))
    code, moved = state.params[codebook.CODES][1], step == 100
    assert (code == ROWS['z']).all(1).any() == moved
    assert (state.ema[codebook.CODES][1] == code).all() == moved
    for moment in (state.opt_state[0].mu, state.opt_state[0].nu):
      assert (
        moment[codebook.CODES] == (np.array([[1], [0], [1]]) if moved else 1)
      ).all() and (moment['other'] == 1).all()
    np.testing.assert_allclose(
      state.extra['bank.usage'][1], 1 / 3 if moved else 0.027, rtol=1e-5
    )
    np.testing.assert_array_equal(
      state.ema[codebook.CODES][::2], before.ema[codebook.CODES][::2]
    )
    if update == 'ema' and moved:
      np.testing.assert_allclose(state.extra['bank.sums'][1], code / 3, rtol=1e-6)
  other = compiled(**options)(before, ROWS, jax.random.key(3))[0].params[
    codebook.CODES
  ][1]
  assert (other == ROWS['z']).all(1).any() and (other != code).any()


def test_a_held_bank_stays():
  assert codebook.extra_state({'other': jnp.ones(1)}, settings()) == {}
  state = start().replace(extra={})
  assert codebook.after_update(state, ROWS, jax.random.key(0), settings()) == (
    state,
    {},
  )
  for config in (settings(update='ema'), settings(restart=100)):
    with pytest.raises(ConfigError, match='train emo_model too'):
      codebook.extra_state({'other': jnp.ones(1)}, config)

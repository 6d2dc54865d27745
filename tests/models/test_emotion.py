"""The emotion model: recorded numbers, a PyTorch twin with gradients, gradient paths
of the bank, ablations.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import naming
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models import parameters
from dicetalk_jax.models.emotion import EmotionConfig, EmotionModel
from tests.models import parity
from tests.models.emotion_twin import Twin

TINY = EmotionConfig(
  prior_dim=12,
  dim=16,
  intermediate_dim=20,
  tokens=3,
  codebook_size=5,
  num_heads=4,
  classifier_in=6,
  classifier_hidden=(8, 7),
  num_classes=4,
)


@pytest.fixture(autouse=True)
def exact_products():
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture(scope='module')
def golden(goldens):
  meta, weights, inputs, outputs = parity.golden(goldens / 'emotion_model')
  graphdef, params = parity.converted(
    EmotionConfig.from_json(meta['constructor']), EmotionModel, weights
  )
  return run(graphdef, params), inputs, outputs


def run(graphdef, params):
  """`f(method, *args)`; it compiles one program per method and shape."""

  def call(params, method, args):
    return method(parameters.merge(graphdef, params), *args)

  jitted = parity.jit(call, static_argnums=1)
  return lambda method, *args: jitted(params, method, args)


RETRIEVE = {
  True: lambda model, prior, drop=None: model(prior, True, drop),
  False: lambda model, prior, drop=None: model(prior, False, drop),
}


def assert_near(actual, expected, tolerance=2e-5):
  """Compares within `tolerance` of the deviation (of the size, for single numbers)."""
  expected = np.asarray(expected)
  actual = np.asarray(actual).reshape(expected.shape)
  scale = expected.std() if expected.size > 1 else np.abs(expected).item()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize('retrieval', [True, False])
@pytest.mark.parametrize('case', ['', '_masked', '_zero'])
def test_golden_tokens(golden, retrieval, case):
  model, inputs, outputs = golden
  prior = inputs['emo_prompts_zero' if case == '_zero' else 'emo_prompts'].reshape(
    -1, 256
  )
  drop = inputs['emo_prompt_mask'].ravel() & (case == '_masked')
  tokens, vq = model(RETRIEVE[retrieval], prior, drop[: len(prior)])
  name = f'retrieval_{"on" if retrieval else "off"}{case}'
  assert_near(tokens, outputs[f'{name}/tokens'])
  assert_near(vq.loss, outputs[f'{name}/vq_loss'])
  if case != '_zero':
    np.testing.assert_array_equal(vq.indices, outputs['codebook/indices'].ravel())


def test_golden_codebook_and_classifier(golden):
  model, inputs, outputs = golden
  quantized, vq = model(
    lambda m, x: m.codebook(x), inputs['emo_prompts'].reshape(-1, 256)
  )
  assert_near(quantized, outputs['codebook/quantized'])
  assert_near(vq.loss, outputs['codebook/vq_loss'])
  logits = model(
    lambda m, x: m.classify(x), np.moveaxis(inputs['classifier_features'], 1, -1)
  )
  assert_near(logits, outputs['classifier_logits'])


@pytest.mark.parametrize('retrieval', [True, False])
def test_no_emotion_in_sampling_is_an_ordinary_zero_prior(golden, retrieval):
  model, _, outputs = golden
  tokens = model(lambda m: m.null_tokens(retrieval=retrieval))
  name = f'retrieval_{"on" if retrieval else "off"}_zero'
  assert_near(tokens, outputs[f'{name}/tokens'])


def test_a_dropped_emotion_in_training_attends_to_a_zero_code(golden):
  """Whatever the prior was; kept rows do not change."""
  model, inputs, outputs = golden
  prior, everyone = inputs['emo_prompts'].reshape(-1, 256), np.ones(6, bool)
  dropped, kept, half = (
    model(RETRIEVE[True], prior, drop)[0]
    for drop in (everyone, ~everyone, np.arange(6) < 3)
  )
  np.testing.assert_allclose(
    dropped, np.broadcast_to(dropped[0], dropped.shape), atol=1e-6
  )
  masked = outputs['retrieval_on_masked/tokens'].reshape(kept.shape)
  assert_near(dropped[0], masked[inputs['emo_prompt_mask'].ravel()][0])
  np.testing.assert_array_equal(half, np.concatenate([dropped[:3], kept[3:]]))
  np.testing.assert_array_equal(kept, model(lambda m, x: m(x, True)[0], prior))


@pytest.mark.parametrize('retrieval', [True, False])
def test_gradients_equal_pytorch(retrieval):
  torch.manual_seed(0)
  twin = Twin(TINY).double()
  weights = {k: v.float().numpy() for k, v in twin.state_dict().items()}
  graphdef, params = parity.converted(TINY, EmotionModel, weights)
  rng = np.random.default_rng(0)
  prior = rng.normal(size=(6, 12))
  features = rng.normal(size=(6, 4, 5, 6))
  weight = rng.normal(size=(6, 3, 16))
  drop = np.arange(6) == 2

  def loss(params):
    model = parameters.merge(graphdef, params)
    tokens, vq = model(jnp.asarray(prior, jnp.float32), retrieval, jnp.asarray(drop))
    return (
      (tokens * weight).sum()
      + vq.loss
      + model.classify(jnp.asarray(features, jnp.float32)).sum()
    )

  value, grads = parity.jit(jax.value_and_grad(loss))(params)
  tokens, vq_loss = twin(torch.tensor(prior), retrieval, torch.tensor(drop))
  expected = (tokens * torch.tensor(weight)).sum() + vq_loss * retrieval
  expected += twin.classify(torch.tensor(features).movedim(-1, 1)).sum()
  expected.backward()
  np.testing.assert_allclose(
    value, expected.item(), rtol=0, atol=2e-5
  )  # terms of size 10 nearly cancel
  grads = naming.to_torch(grads)
  for name, parameter in twin.named_parameters():
    reference = (
      np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
    )
    # A key's bias shifts all logits alike: its gradient is zero but for rounding.
    scale = 1 if name == 'attention.fc_k.bias' else np.abs(reference).max()
    np.testing.assert_allclose(
      grads[name], reference, rtol=0, atol=2e-5 * scale, err_msg=name
    )


def variant(**changes):
  return parameters.abstract(
    lambda rngs: EmotionModel(
      EmotionConfig.from_json(TINY.to_json() | changes), rngs=rngs
    )
  )[0]


class TestBank:
  """Gradient paths of the look-up."""

  graphdef, target = parity.abstract(TINY, EmotionModel)
  params = parameters.numpy_params(target)
  prior = np.random.default_rng(4).normal(size=(7, 12)).astype(np.float32)
  table, fc = 'codebook.codebook.embedding', 'codebook.fc.kernel'

  def look_up(self, params):
    """z, the code and the look-up's loss and indices."""
    codebook = parameters.merge(self.graphdef, params).codebook
    prior = jnp.asarray(self.prior)
    return codebook.fc(prior), *codebook(prior)

  def gradient(self, function):
    """Gradient of `function(code, vq)` for the codebook's parameters."""
    return parity.jit(jax.grad(lambda params: function(*self.look_up(params)[1:])))(
      self.params
    )

  def test_nearest_by_brute_force(self):
    z, code, vq = parity.jit(self.look_up)(self.params)
    table = np.float64(self.params[self.table])
    nearest = [
      min(range(5), key=lambda k: ((row - table[k]) ** 2).sum())
      for row in np.float64(z)
    ]
    assert len(set(nearest)) > 1
    np.testing.assert_array_equal(vq.indices, nearest)
    np.testing.assert_allclose(code, table[nearest], atol=1e-6)
    assert vq.loss.dtype == jnp.float32

  def test_first_of_equal_codes(self):
    _, _, vq = parity.jit(self.look_up)(self.params | {self.table: jnp.ones((5, 16))})
    assert not vq.indices.any()

  def test_straight_through_is_the_identity(self):
    weight = np.random.default_rng(5).normal(size=(7, 16))
    grads = self.gradient(lambda code, vq: (code * weight).sum())
    assert not grads[self.table].any()
    np.testing.assert_allclose(
      grads[self.fc], self.prior.T @ weight, rtol=1e-5, atol=1e-5
    )

  def test_loss_moves_codes_to_priors_and_priors_to_codes(self):
    """2/n (c - z) for the codes that were hit, 2 beta/n (z - c) for the projection,
    and nothing crosswise.
    """
    grads = self.gradient(lambda code, vq: vq.loss)
    z, code, vq = jax.tree.map(np.asarray, parity.jit(self.look_up)(self.params))
    pull, expected = 2 * (code - z) / z.size, np.zeros((5, 16))
    np.add.at(expected, vq.indices, pull)
    np.testing.assert_allclose(grads[self.table], expected, atol=1e-6)
    np.testing.assert_allclose(grads[self.fc], -0.25 * self.prior.T @ pull, atol=1e-6)

  def changed(self, **changes):
    other = TestBank()
    other.graphdef = variant(**changes)
    return other

  def test_cosine_ignores_lengths(self):
    cosine, plain = (
      self.changed(distance='cosine'),
      parity.jit(self.look_up)(self.params),
    )
    stretched = self.params | {
      self.table: self.params[self.table] * np.float32([[1], [9], [0.1], [3], [0.5]])
    }
    z, _, vq = parity.jit(cosine.look_up)(self.params)

    def unit(x):
      return np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True)

    nearest = (unit(z) @ unit(self.params[self.table]).T).argmax(1)
    np.testing.assert_array_equal(vq.indices, nearest)
    np.testing.assert_array_equal(
      parity.jit(cosine.look_up)(stretched)[2].indices, nearest
    )
    assert (parity.jit(self.look_up)(stretched)[2].indices != plain[2].indices).any()

  def test_stopped_projection_feels_only_what_uses_the_code(self):
    stopped, weight = (
      self.changed(stop_fc_grad=True),
      np.random.default_rng(5).normal(size=(7, 16)),
    )
    assert (
      parity.jit(stopped.look_up)(self.params)[2].loss
      == parity.jit(self.look_up)(self.params)[2].loss
    )
    grads, plain = (
      stopped.gradient(lambda code, vq: vq.loss),
      self.gradient(lambda code, vq: vq.loss),
    )
    assert not grads[self.fc].any() and plain[self.fc].any()
    np.testing.assert_allclose(grads[self.table], plain[self.table], atol=1e-7)
    grads = stopped.gradient(lambda code, vq: (code * weight).sum())
    np.testing.assert_allclose(
      grads[self.fc], self.prior.T @ weight, rtol=1e-5, atol=1e-5
    )

  def test_averaged_codes_have_no_gradient(self):
    averaged, (_, _, plain) = (
      self.changed(codebook_update='ema'),
      parity.jit(self.look_up)(self.params),
    )
    grads = averaged.gradient(lambda code, vq: vq.loss + code.sum())
    assert not grads[self.table].any() and grads[self.fc].any()
    _, _, vq = parity.jit(averaged.look_up)(self.params)
    np.testing.assert_allclose(vq.loss, 0.25 * plain.error, rtol=1e-6)
    np.testing.assert_allclose(plain.loss, 1.25 * plain.error, rtol=1e-6)


def test_null_keys_can_be_the_same_in_training_and_sampling():
  """Dropped emotions become what sampling uses for none; kept ones do not change."""
  params = parameters.numpy_params(parity.abstract(TINY, EmotionModel)[1])
  prior = np.random.default_rng(1).normal(size=(4, 12)).astype(np.float32)
  drop = np.arange(4) < 2

  def both(m, *args):
    sampled = m.null_tokens(), m.null_tokens(retrieval=True)
    return m(args[0], True, args[1])[0], sampled

  def of(null_kv):
    """Tokens in training, and of no emotion in sampling, without and with look-up."""
    return run(variant(null_kv=null_kv), params)(both, prior, drop)

  trained, (whole_bank, nearest) = of('released')
  zero_code = trained[0]
  for one, other in itertools.combinations((zero_code, whole_bank, nearest), 2):
    assert not np.allclose(one, other, atol=1e-3)
  for null_kv, null in (('zeros', zero_code), ('bank', whole_bank)):
    tokens, sampled = of(null_kv)
    np.testing.assert_array_equal(*sampled)
    np.testing.assert_allclose(sampled[0], null, atol=1e-6)
    np.testing.assert_allclose(tokens[:2], np.stack([null] * 2), atol=1e-6)
    np.testing.assert_allclose(tokens[2:], trained[2:], atol=1e-6)


def test_shared_bank_equals_a_bank_per_row():
  graphdef, target = parity.abstract(TINY, EmotionModel)
  model = run(graphdef, parameters.numpy_params(target))
  prior = np.random.default_rng(1).normal(size=(4, 12)).astype(np.float32)
  together = model(RETRIEVE[False], prior)[0]
  apart = np.concatenate(
    [model(RETRIEVE[False], prior[i : i + 1])[0] for i in range(4)]
  )
  np.testing.assert_allclose(together, apart, atol=1e-6)


def test_ablations():
  """`direct` has only the token projection; `learnable` lacks the look-up; neither
  has a loss of its own.
  """
  prior = np.random.default_rng(1).normal(size=(2, 12)).astype(np.float32)
  names, models = {}, {}
  for mode in ('direct', 'learnable', 'bank'):
    config = EmotionConfig.from_json(TINY.to_json() | {'mode': mode})
    graphdef, target = parity.abstract(config, EmotionModel)
    names[mode], models[mode] = (
      set(target),
      run(graphdef, parameters.numpy_params(target)),
    )
    tokens, vq = models[mode](RETRIEVE[True], prior)
    assert tokens.shape == (2, 3, 16)
    assert (vq.loss > 0) == (mode == 'bank')
    assert len(vq.indices) == (2 if mode == 'bank' else 0)
  assert names['bank'] - names['learnable'] == {
    'codebook.fc.kernel',
    'codebook.fc.bias',
  }
  assert {name.split('.')[0] for name in names['direct']} == {
    'emo_linear',
    'classifier',
  }
  tokens = models['direct'](lambda m, x: m.emo_linear(x[:, None])[:, 0], prior)
  np.testing.assert_allclose(
    models['direct'](RETRIEVE[True], prior)[0], tokens, atol=1e-6
  )
  whole_bank = models['bank'](RETRIEVE[False], prior)[0]
  np.testing.assert_allclose(
    models['learnable'](RETRIEVE[True], prior)[0], whole_bank, atol=1e-6
  )
  with pytest.raises(ConfigError, match='choose one of bank, direct, learnable'):
    EmotionConfig(mode='bnak')


def test_classifier_dropout_is_by_key():
  config = EmotionConfig.from_json(
    TINY.to_json() | {'dropout': 0.5, 'classifier_hidden': [64, 64]}
  )
  graphdef, target = parity.abstract(config, EmotionModel)
  model, features = (
    run(graphdef, parameters.numpy_params(target)),
    np.ones((3, 2, 2, 6), np.float32),
  )

  def classify(m, x, key):
    return m.classify(x, key)

  quiet, first, second = (
    model(classify, features, key)
    for key in (None, jax.random.key(0), jax.random.key(1))
  )
  np.testing.assert_array_equal(quiet, model(classify, features, None))
  np.testing.assert_array_equal(first, model(classify, features, jax.random.key(0)))
  assert not np.allclose(first, second)
  assert not np.allclose(first[0], first[1])  # rows have masks of their own

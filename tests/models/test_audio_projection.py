import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax.models.audio_projection import AudioProjection, AudioProjectionConfig
from dicetalk_jax.models.parameters import merge
from tests.models import parity


@pytest.fixture(scope='module')
def recorded(goldens):
  settings, weights, inputs, outputs = parity.golden(goldens / 'audio_proj')
  graphdef, params = parity.converted(
    AudioProjectionConfig.from_json(settings['constructor']), AudioProjection, weights
  )

  def project(x):
    with jax.default_matmul_precision('highest'):
      return merge(graphdef, params)(x)

  return project, inputs, outputs


@pytest.mark.parametrize('case', ['', '_zero', '_small'])
def test_golden(recorded, case):
  project, inputs, outputs = recorded
  tokens = parity.jit(project)(inputs[f'audio_embeds{case}'])
  assert parity.error(tokens, outputs[f'context_tokens{case}']) < 2e-5


def test_flattened_features_and_frames_are_independent(recorded):
  project, inputs, _ = recorded
  project = parity.jit(project)
  x = inputs['audio_embeds']
  tokens = project(x)
  np.testing.assert_array_equal(project(x.reshape(*x.shape[:2], -1)), tokens)
  np.testing.assert_allclose(project(x[1:, 2:]), tokens[1:, 2:], atol=1e-5)


def test_gradient_of_input(recorded):
  project, inputs, _ = recorded
  x = jnp.asarray(inputs['audio_embeds'])
  cotangent = np.random.default_rng(0).normal(size=(2, 3, 4, 32)).astype(np.float32)

  def loss(x):
    return jnp.vdot(project(x), cotangent)

  @parity.jit
  def measure(x):
    grad = jax.grad(loss)(x)
    step = 1e-2 * grad / jnp.linalg.norm(grad)
    return (loss(x + step) - loss(x - step)) / 2e-2, jnp.linalg.norm(grad)

  slope, expected = measure(x)
  # Central differences in float32 see about three digits.
  np.testing.assert_allclose(slope, expected, rtol=1e-2)


def test_full_size():
  graphdef, params = parity.abstract(AudioProjectionConfig(), AudioProjection)
  out = jax.eval_shape(
    lambda p, x: merge(graphdef, p)(x),
    params,
    jax.ShapeDtypeStruct((1, 25, 10, 5, 384), 'float32'),
  )
  assert out.shape == (1, 25, 32, 1024)


def test_compute_dtype():
  config = AudioProjectionConfig(
    channels=2, intermediate_dim=8, output_dim=8, context_tokens=2
  )
  graphdef, target = parity.abstract(config, AudioProjection, dtype=jnp.bfloat16)
  assert all(x.dtype == jnp.float32 for x in target.values())
  x = jax.ShapeDtypeStruct((1, 1, 10, 5, 2), 'float32')
  assert (
    jax.eval_shape(lambda p, x: merge(graphdef, p)(x), target, x).dtype == jnp.bfloat16
  )

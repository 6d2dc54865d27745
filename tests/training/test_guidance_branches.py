"""Sampling with guidance sees what training sees when it drops conditions.

Training attends to the whole bank here, as sampling does. What it looks up otherwise is
another emotion, by design.
"""

import copy
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax.diffusion import edm, guidance, sampler, schedule
from dicetalk_jax.diffusion.condition_dropout import Dropped
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.models.attention import KeyValue
from tests import tiny
from tests.training.toy_loss import C, D, F, H, batch, make_loss


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation():
    yield


class ExactModels:
  """Stands in for every model.

  It maps whole numbers to whole numbers, so that no order of summation rounds.
  """

  def __init__(self):
    def whole(seed, *shape):
      return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)

    self.prior = whole(0, 6, 2 * D)
    self.nothing = whole(1, 2, D)
    self.key = whole(2, 3, D, C)

  def models(self, params):
    return {
      'unet': self,
      'audio_linear': self.audio_linear,
      'pose_guider': self.pose_guider,
      'emo_model': self,
    }

  def audio_linear(self, audio):
    *leading, _, _, _ = audio.shape
    states = audio.reshape(*leading, -1)[..., : 2 * D]
    return 1 + states.reshape(*leading, 2, D)

  def pose_guider(self, mask):
    return mask[:, ::2, ::2, :C]

  def __call__(self, prior, retrieval, drop=None):  # the emotion model
    return (prior @ self.prior).reshape(-1, 2, D) + 5 * retrieval, None

  def null_tokens(self):
    return jnp.asarray(self.nothing)

  def context_kv(self, *contexts):  # the UNet
    pairs = [KeyValue(x @ w, -2 * x @ w) for x, w in zip(contexts, self.key)]
    return {'attn2': tuple(pairs)}


class Spy:
  """Notes what the network would see."""

  def __init__(self, network):
    self.context_kv = network.context_kv

  def __call__(self, *args, **kwargs):
    self.seen = *args, kwargs['spatial_condition']
    return args[0], None


def one_clip():
  return {name: jnp.asarray(value[:1]) for name, value in batch().items()}


def row_per_branch(clip):
  return {name: jnp.repeat(x, guidance.BRANCHES, 0) for name, x in clip.items()}


def predict(loss, models, rows, sample, noise_level):
  """What training predicts for the three branches of guidance.

  Each branch leaves out other conditions: the first all of them, the second all but the
  image, the third none.
  """
  first = jnp.array([True, False, False])
  first_two = jnp.array([True, True, False])
  dropped = Dropped(image=first, audio=first_two, emotion=first_two)
  emotion, _ = loss._emotion_tokens(
    models['emo_model'], rows['mu'], dropped, jax.random.key(0)
  )
  face = loss.face_conditions(models, rows, (H, H))
  levels = jnp.full(3, noise_level)
  prediction, *_ = loss.predict(models, rows, dropped, sample, levels, emotion, face)
  return prediction


def assert_branches_equal_dropped_forwards(loss, params, clip, assert_equal):
  rows = row_per_branch(clip)

  @jax.jit
  def training(params):
    models = loss.models(params)
    spy = Spy(models['unet'])
    predict(loss, models | {'unet': spy}, rows, rows['latents'], 0.3)
    return spy.seen

  @jax.jit
  def sampling(params):
    conditions = loss.conditions(params, clip)
    tables = sampler.context_tables(loss.models(params)['unet'], conditions)
    frames = jnp.arange(F)[None, None]
    return conditions, sampler.gather_contexts(tables, frames, jnp.array([F]))

  sample, _, contexts, ids, spatial = training(params)
  conditions, gathered = sampling(params)
  for pair, expected in zip(contexts['attn2'], gathered['attn2'], strict=True):
    for x, y in zip(pair, expected):
      assert_equal(np.broadcast_to(x, y.shape), y)
  reference = np.asarray(conditions.reference_latents)
  has_image = guidance.HAS_IMAGE[:, None, None, None]
  assert_equal(sample[:, 0, ..., C:], reference * has_image)
  assert_equal(ids, np.repeat(conditions.added_time_ids, 3, 0))
  assert_equal(spatial[:, 0], np.repeat(conditions.spatial, 3, 0))


def test_guidance_branches_equal_dropped_forwards_to_the_bit():
  """Exact arithmetic leaves no room for rounding."""
  loss, params, _ = make_loss(emotion__p_whole_bank=1.0)
  loss = copy.copy(loss)
  loss.models = ExactModels().models
  clip = {name: jnp.round(3 * x).astype(x.dtype) for name, x in one_clip().items()}
  assert_branches_equal_dropped_forwards(
    loss, params, clip, np.testing.assert_array_equal
  )


@pytest.mark.parametrize('null_kv', ['released', 'bank'])
def test_guidance_branches_equal_dropped_forwards(null_kv):
  """The two programs multiply arrays of different shapes, which round differently."""
  loss, params, _ = make_loss(emo_model__null_kv=null_kv, emotion__p_whole_bank=1.0)
  assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
  assert_branches_equal_dropped_forwards(loss, params, one_clip(), assert_close)


def test_a_sampling_step_is_the_guided_sum_of_dropped_forwards():
  """The network is a real UNet here."""
  sizes = tiny.CONFIGS['unet'] | dict(in_channels=2 * C, out_channels=C)
  build = registry.builder('unet', sizes)
  loss, params, _ = make_loss(
    network=build,
    emotion__p_whole_bank=1.0,
    pose_guider__conditioning_embedding_channels=8,
  )
  config = sampler.SamplerConfig(
    num_steps=1,
    frames=F,
    shift=0,
    padding=False,
    g_image=1.5,
    g_condition=2.5,
    sigma_max=2.0,
    scaling_factor=0.5,
  )
  clip = one_clip()
  noise = np.random.default_rng(9).normal(size=(1, F, H, H, C)).astype(np.float32)
  sigma, *_ = schedule.karras_sigmas(1, config.sigma_min, config.sigma_max)
  z = 0.5 * clip['reference'][:, None] + sigma * noise

  @jax.jit
  def training(params):
    scaled = jnp.repeat(z * edm.c_in(sigma), guidance.BRANCHES, 0)
    rows = row_per_branch(clip)
    return predict(loss, loss.models(params), rows, scaled, edm.c_noise(sigma))

  v = np.asarray(training(params))
  for a, b in itertools.combinations(v, 2):
    assert np.abs(a - b).max() > 1e-2
  guided = jnp.asarray(v[0] + 1.5 * (v[1] - v[0]) + 2.5 * (v[2] - v[1]))
  expected = edm.denoised(z[0], guided, sigma)

  graphdef, _ = parameters.abstract(build)
  sample = sampler.make_sampler(graphdef, config)
  clips = sample(
    parameters.strip_prefix('unet', params),
    noise,
    jax.jit(loss.conditions)(params, clip),
    jnp.array([F]),
  )
  np.testing.assert_allclose(clips[0], expected, rtol=1e-5, atol=1e-5)

"""The loss of the diffusion task around a toy network: each switch changes what it
names and nothing else.
"""

import copy
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import diffusion
from dicetalk_jax.data import clip_record
from dicetalk_jax.diffusion import edm, guidance, sampler, schedule
from dicetalk_jax.diffusion.condition_dropout import Dropped
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.models.attention import KeyValue
from dicetalk_jax.training.diffusion_loss import DiffusionLoss, emotion_discrimination
from tests import tiny

B, F, H, C, D = 4, 3, 4, 2, 8
SIZES = {
  'audio_linear': dict(
    seq_len=10, blocks=2, channels=3, intermediate_dim=6, output_dim=D, context_tokens=2
  ),
  'pose_guider': dict(conditioning_embedding_channels=C, block_out_channels=(2, 2)),
  'emo_model': dict(
    prior_dim=6,
    dim=D,
    intermediate_dim=6,
    tokens=2,
    codebook_size=5,
    num_heads=2,
    classifier_in=C,
    classifier_hidden=(4, 4),
    num_classes=22,
    dropout=0.0,
  ),
}
near = functools.partial(pytest.approx, rel=1e-5)  # two programs may round differently
NOTHING, IMAGE, EMOTION = (
  0.99,
  0.07,
  0.12,
)  # draws of condition dropout with the default rates


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation():
    yield


class Toy(nnx.Module):
  """Answers to every input of the UNet: sample, noise level, contexts, face."""

  def __init__(self, *, rngs):
    def draw(*shape):
      return nnx.Param(jax.random.normal(rngs.params(), shape) * 0.4)

    self.mix, self.key = draw(2 * C, C), draw(3, D, C)

  def context_kv(self, *contexts):
    return {
      'attn2': tuple(
        None if x is None else KeyValue(x @ w, jnp.tanh(x @ w))
        for x, w in zip(contexts, self.key[...])
      )
    }

  def __call__(
    self, sample, timestep, kv, ids, spatial_condition=None, masks=None, remat='none'
  ):
    x = sample @ self.mix[...] + (0 if spatial_condition is None else spatial_condition)
    for pair in kv['attn2']:
      x += 0 if pair is None else (pair[0] * pair[1]).mean(-2)[:, :, None, None]
    x = jnp.tanh(
      x
      + timestep[:, None, None, None, None] * 0.1
      + ids.sum(-1)[:, None, None, None, None] * 0.01
    )
    return x, x


@functools.cache
def make(arg='default', network=Toy, **changes):
  """The loss of a preset around a network, its parameters, and `f(params, batch,
  key, step)` as one program.
  """
  config = diffusion.get_config(arg)
  for name, values in SIZES.items():
    if name in config:
      config[name].update(values)
  config.unet.block_out_channels = (C,)
  config.update_from_flattened_dict(
    {key.replace('__', '.'): value for key, value in changes.items()}
  )
  builds = {
    name: registry.builder(name, config[name].to_dict())
    for name in SIZES
    if name in config
  }
  builds['unet'] = network
  abstract = {name: parameters.abstract(build) for name, build in builds.items()}
  loss = DiffusionLoss(
    config, {name: graph for name, (graph, _) in abstract.items()}, scaling_factor=0.5
  )
  shapes = {
    f'{name}.{k}': x
    for name, (_, target) in abstract.items()
    for k, x in target.items()
  }
  return loss, parameters.numpy_params(shapes), jax.jit(loss)


def batch(draw=NOTHING, **changes):
  def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)

  mask = np.zeros((B, 2 * H, 2 * H), np.float32)
  mask[:, 2:7, 1:6] = 1
  return {
    'latents': normal(0, B, F, H, H, C),
    'reference': normal(1, B, H, H, C),
    'image_token': normal(2, B, 1, D),
    'audio': normal(3, B, F, 10, 2, 3),
    'mu': normal(4, B, 6),
    'sigma': np.abs(normal(5, B, 6)),
    'mask': mask,
    'emotion_class': np.array([0, 5, -1, 21], np.int32),
    'buckets': np.ones((B, 2), np.float32),
    'drop': np.full(B, draw, np.float32),
  } | changes


def run(arg='default', data=None, step=10**9, **changes):
  """(total, parts) of a preset with changed settings, written `section__key`."""
  _, params, loss = make(arg, **changes)
  total, parts = loss(
    params, batch() if data is None else data, jax.random.key(3), jnp.int32(step)
  )
  return float(total), {
    k: v if isinstance(v, dict) else float(v) for k, v in parts.items() if '/' not in k
  }


def without(parts, *names):
  return {k: v for k, v in parts.items() if k not in (*names, 'per_row')}


def test_equation_15():
  total, parts = run()
  assert total == pytest.approx(
    parts['denoise'] + 0.05 * parts['cls'] + parts['vq'], rel=1e-6
  )
  assert run(step=0)[0] == pytest.approx(
    parts['denoise'] + 0.05 / 1000 * parts['cls'] + parts['vq'], rel=1e-6
  )
  assert parts['vq'] == pytest.approx(1.25 * parts['vq_error'], rel=1e-5)
  assert set(parts['per_row']) == {'code', 'z', 'emotion_class'}
  np.testing.assert_allclose(
    parts['z_rms'], np.sqrt(np.square(parts['per_row']['z']).mean()), rtol=1e-5
  )
  assert parts['codes_used'] == len(np.unique(parts['per_row']['code']))


@pytest.mark.parametrize('sigma', [0.01, 1.0, 100.0])
def test_denoising_loss_is_the_weighted_error_of_the_denoised_clip(sigma):
  """The loss of a network F is EDM's error of D (equations 7 and 8, table 1), computed
  here in float64.
  """
  plain, params, _ = make(noise__p_mean=float(np.log(sigma)), noise__p_std=0.0)
  loss, data, seen = copy.copy(plain), batch(), []

  def network(array, scaled, reference, timestep):
    return array.tanh(0.6 * scaled - 0.3 * reference + 0.2 * timestep)

  class StandIn:
    context_kv = plain.models(params)['unet'].context_kv

    def __call__(self, sample, timestep, *_, **__):
      seen.append((sample, timestep))
      v = network(
        jnp, sample[..., :C], sample[..., C:], timestep[:, None, None, None, None]
      )
      return v, v

  loss.models = lambda params: plain.models(params) | {'unet': StandIn()}
  denoise = jax.jit(
    lambda params, data: (
      loss(params, data, jax.random.key(3), jnp.int32(0))[1]['denoise'],
      seen.pop(),
    )
  )
  ours, (sample, timestep) = denoise(params, data)
  np.testing.assert_allclose(timestep, np.log(sigma) / 4, rtol=1e-6)
  x, scaled = 0.5 * np.float64(data['latents']), np.float64(sample[..., :C])
  z = np.sqrt(1 + sigma**2) * scaled
  noise = (z - x) / sigma
  assert abs(noise.mean()) < 0.2 and noise.std() == pytest.approx(1, abs=0.15)
  f = network(np, scaled, np.float64(data['reference'])[:, None], np.log(sigma) / 4)
  d = z / (1 + sigma**2) - sigma / np.sqrt(1 + sigma**2) * f
  assert float(ours) == pytest.approx(
    (1 + sigma**2) / sigma**2 * np.square(d - x).mean(), rel=1e-4
  )


def test_ranges_of_noise_levels_make_up_the_whole():
  """A clip without a label has no part in the discrimination."""
  _, params, loss = make('default')
  _, parts = loss(params, batch(), jax.random.key(3), jnp.int32(0))
  for name, counted in (('denoise', 4), ('cls', 3)):
    total, weight = map(
      float,
      sum(pair for key, pair in parts.items() if key.startswith(f'{name}/sigma_')),
    )
    assert total / weight == near(float(parts[name])) and weight == counted / 4


def test_without_classification_only_its_term_is_gone():
  (total, parts), (less, same) = run(), run('abl_no_cls')
  assert without(parts) == near(without(same))
  assert less == pytest.approx(total - 0.05 * parts['cls'], rel=1e-5)


def test_without_prior_the_mean_is_used():
  certain = batch(sigma=np.zeros((B, 6), np.float32))
  total, parts = run('abl_no_prior')
  assert without(parts) == near(without(run(data=certain)[1]))
  assert total != near(run()[0])
  assert total == near(run('abl_no_prior', certain)[0]) and total == near(
    run(data=certain)[0]
  )


@pytest.mark.parametrize('arg', ['abl_no_bank', 'abl_learnable_ca', 'svp'])
def test_without_bank_there_is_no_look_up(arg):
  total, parts = run(arg)
  assert set(parts) == {'denoise', 'cls', 'cls_accuracy'} and parts['denoise'] != near(
    run()[1]['denoise']
  )
  assert total == pytest.approx(
    parts['denoise'] + (0 if arg == 'svp' else 0.05 * parts['cls']), rel=1e-6
  )
  nothing, too = (
    run(arg, batch(EMOTION, mu=mu))[1]
    for mu in np.float32([np.zeros((B, 6)), np.ones((B, 6))])
  )
  assert nothing == near(too)


def test_sonic_knows_neither_emotion_nor_guide():
  bare = {k: v for k, v in batch().items() if k not in ('mu', 'sigma', 'emotion_class')}
  total, parts = run('sonic', bare)
  assert set(parts) == {'denoise'} and total == parts['denoise']
  _, params, _ = make('sonic')
  assert {name.partition('.')[0] for name in params} == {'unet', 'audio_linear'}
  assert run('sonic', bare | {'audio': bare['audio'] + 1})[0] != near(total)
  arrays = {name: jnp.asarray(value) for name, value in bare.items()}
  conditions = make('sonic')[0].conditions(params, arrays)
  assert (
    conditions.emotion_tokens is conditions.null_emotion is conditions.spatial is None
  )


def test_classification_of_clips():
  (_, frames), (_, clips) = run(), run(loss__cls_pool='clip')
  assert without(frames, 'cls', 'cls_accuracy') == near(
    without(clips, 'cls', 'cls_accuracy')
  )
  assert frames['cls'] != near(clips['cls'])
  one = batch(latents=batch()['latents'][:, :1], audio=batch()['audio'][:, :1])
  assert run(data=one)[1]['cls'] == pytest.approx(
    run(data=one, loss__cls_pool='clip')[1]['cls'], rel=1e-6
  )


def test_evaluation_measures_what_sampling_does():
  """The whole bank, the mean of each prior and a clean reference, even where training
  sees none of them; and no dropout.
  """

  def judged(**changes):
    loss, params, _ = make(**changes)
    total, parts = jax.jit(functools.partial(loss, train=False))(
      params, batch(), jax.random.key(3), jnp.int32(10**9)
    )
    return {
      'total': float(total),
      **{k: float(v) for k, v in parts.items() if '/' not in k and k != 'per_row'},
    }

  as_sampled = {'emotion__p_whole_bank': 1.0, 'emotion__sample': False}
  total, parts = run(**as_sampled)
  expected = near({'total': total, **without(parts)})
  training_only = {'emo_model__dropout': 0.5, 'noise__ref_aug': 'lognormal'}
  for setting in ({}, as_sampled, training_only):
    assert judged(**setting) == expected
    assert (run(**setting)[0] == near(total)) == (setting == as_sampled)


def test_the_frame_rate_follows_the_step():
  for step, fps in ((1, 25.0), (2, 12.5), (5, 5.0)):
    loss, params, _ = make(data__step=step)
    face = loss.face_conditions(loss.models(params), batch(), (H, H))
    np.testing.assert_array_equal(face.time_ids, [[fps, 1, 1]] * B)


def test_an_emotion_of_unknown_level_is_right_at_any_level():
  logits = np.random.default_rng(0).normal(size=(1, F, 22)).astype(np.float32)
  none_dropped = np.zeros(1, bool)

  def judged(emotion, level):
    label = np.array([clip_record.emotion_class(emotion, level)], np.int32)
    loss, accuracy = emotion_discrimination(logits, label, none_dropped)
    return float(loss), float(accuracy)

  probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  first = clip_record.emotion_class('sad', 1)
  of_sad = probability[..., first : first + 3].sum(-1)
  loss, accuracy = judged('sad', 0)
  assert loss == near(-np.log(of_sad).mean())
  assert accuracy == near(sum(judged('sad', level)[1] for level in (1, 2, 3)))
  exact = -np.log(probability[..., first + 1]).mean()
  assert judged('sad', 2)[0] == near(exact)
  # Without a label nothing is learned.
  assert judged('unknown', 0) == (0.0, 0.0)


def test_noise_on_the_reference():
  (plain, parts), (noisy, changed) = run(), run(noise__ref_aug='lognormal')
  assert plain != near(noisy) and parts['vq'] == near(changed['vq'])
  unseen, too = (
    run(data=batch(IMAGE)),
    run(data=batch(IMAGE), noise__ref_aug='lognormal'),
  )
  assert without(unseen[1]) == near(without(too[1]))
  disturb = make()[0]._disturbed(jnp.zeros((2000, 4, 4, 2)), jax.random.key(0))
  strength = np.log(
    0.5 * np.asarray(disturb).std((1, 2, 3))
  )  # in units of scaled latents
  assert strength.mean() == pytest.approx(
    -3, abs=0.1
  ) and strength.std() == pytest.approx(0.5, abs=0.1)


def test_null_keys_matter_where_the_emotion_is_dropped():
  kept = [run(emo_model__null_kv=name)[0] for name in ('released', 'zeros', 'bank')]
  assert kept == near([kept[0]] * 3)
  released, zeros, whole = (
    run(data=batch(EMOTION), emo_model__null_kv=n)[0]
    for n in ('released', 'zeros', 'bank')
  )
  assert released == near(zeros) and released != near(whole)


def test_dropped_emotions_take_no_part():
  """Neither the prior nor the label of a clip without emotion is seen; the bank is."""
  total, parts = run(data=batch(EMOTION))
  other_total, other = run(data=batch(EMOTION, mu=batch()['mu'] + 1))
  assert parts['cls'] == parts['cls_accuracy'] == 0
  assert parts['denoise'] == other['denoise'] and parts['vq'] != near(other['vq'])
  assert other_total != near(total)


class Exact:
  """Stands in for every model: whole numbers in, whole numbers out, so that no order
  of summation rounds.
  """

  def __init__(self):
    def whole(seed, *shape):
      return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)

    self.prior, self.nothing, self.key = (
      whole(0, 6, 2 * D),
      whole(1, 2, D),
      whole(2, 3, D, C),
    )

  def audio_linear(self, audio):
    return 1 + audio.reshape(*audio.shape[:-3], -1)[..., : 2 * D].reshape(
      *audio.shape[:-3], 2, D
    )

  def pose_guider(self, picture):
    return picture[:, ::2, ::2, :C]

  def __call__(self, prior, retrieval, drop=None):  # the emotion model
    return (prior @ self.prior).reshape(-1, 2, D) + 5 * retrieval, None

  def null_tokens(self):
    return jnp.asarray(self.nothing)

  def context_kv(self, *contexts):  # the UNet
    pairs = [KeyValue(x @ w, -2 * x @ w) for x, w in zip(contexts, self.key)]
    return {'attn2': tuple(pairs)}


def left_out():
  """The conditions that the three branches of guidance leave out."""
  nothing_alone = jnp.array([True, False, False])
  all_but_the_last = jnp.array([True, True, False])
  return Dropped(nothing_alone, all_but_the_last, all_but_the_last)


@pytest.mark.parametrize(
  'exact, null_kv', [(True, 'released'), (False, 'released'), (False, 'bank')]
)
def test_guidance_branches_equal_dropped_forwards(exact, null_kv):
  """The sampler's three branches see what training sees with conditions dropped.

  To the bit where arithmetic is exact; else both programs round products of
  other shapes differently.

  Training attends to the whole bank here, as sampling does; what it looks up is another
  emotion, by design.
  """
  loss, params, _ = make(emo_model__null_kv=null_kv, emotion__p_whole_bank=1.0)
  one = {k: jnp.asarray(v[:1]) for k, v in batch().items()}
  if exact:
    loss, model = copy.copy(loss), Exact()
    loss.models = lambda params: {
      'unet': model,
      'audio_linear': model.audio_linear,
      'pose_guider': model.pose_guider,
      'emo_model': model,
    }
    one = {k: jnp.round(3 * v).astype(v.dtype) for k, v in one.items()}
  rows = {
    k: jnp.repeat(v, guidance.BRANCHES, 0) for k, v in one.items()
  }  # one clip, a row per branch
  equal = (
    np.testing.assert_array_equal
    if exact
    else functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
  )

  class Spy:
    """Tells what the network would see."""

    def __init__(self, inner):
      self.context_kv = inner.context_kv

    def __call__(self, *args, **kwargs):
      self.seen = *args, kwargs['spatial_condition']
      return args[0], None

  @jax.jit
  def training(params):
    model = loss.models(params)
    spy = model['unet'] = Spy(model['unet'])
    emotion, _ = loss._emotion_tokens(
      model['emo_model'], rows['mu'], left_out(), jax.random.key(0)
    )
    loss.predict(
      model,
      rows,
      left_out(),
      rows['latents'],
      jnp.full(3, 0.3),
      emotion,
      loss.face_conditions(model, rows, (H, H)),
    )
    return spy.seen

  @jax.jit
  def sampling(params):
    c = loss.conditions(params, one)
    tables = sampler.context_tables(loss.models(params)['unet'], c)
    return c, sampler.gather_contexts(tables, jnp.arange(F)[None, None], jnp.array([F]))

  (sample, _, kv, ids, spatial), (c, gathered) = training(params), sampling(params)
  for pair, expected in zip(kv['attn2'], gathered['attn2'], strict=True):
    for x, y in zip(pair, expected):
      equal(np.broadcast_to(x, y.shape), y)
  reference = np.asarray(c.reference_latents) * guidance.HAS_IMAGE[:, None, None, None]
  equal(sample[:, 0, ..., C:], reference)
  equal(ids, np.repeat(c.added_time_ids, 3, 0))
  equal(spatial[:, 0], np.repeat(c.spatial, 3, 0))


def test_a_sampling_step_is_the_guided_sum_of_dropped_forwards():
  """The same through a real UNet."""
  sizes = tiny.CONFIGS['unet'] | dict(in_channels=2 * C, out_channels=C)
  loss, params, _ = make(
    network=registry.builder('unet', sizes),
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
  one = {k: jnp.asarray(v[:1]) for k, v in batch().items()}
  rows = {k: jnp.repeat(v, guidance.BRANCHES, 0) for k, v in one.items()}
  noise = np.random.default_rng(9).normal(size=(1, F, H, H, C)).astype(np.float32)
  sigma, *_ = schedule.karras_sigmas(1, config.sigma_min, config.sigma_max)
  z = 0.5 * one['reference'][:, None] + sigma * noise

  @jax.jit
  def training(params):
    model = loss.models(params)
    emotion, _ = loss._emotion_tokens(
      model['emo_model'], rows['mu'], left_out(), jax.random.key(0)
    )
    scaled = jnp.repeat(z * edm.c_in(sigma), guidance.BRANCHES, 0)
    return loss.predict(
      model,
      rows,
      left_out(),
      scaled,
      jnp.full(3, edm.c_noise(sigma)),
      emotion,
      loss.face_conditions(model, rows, (H, H)),
    )[0]

  v = np.asarray(training(params))
  assert min(np.abs(v[i] - v[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-2
  sample = sampler.make_sampler(
    parameters.abstract(registry.builder('unet', sizes))[0], config
  )
  out = sample(
    parameters.strip_prefix('unet', params),
    noise,
    jax.jit(loss.conditions)(params, one),
    jnp.array([F]),
  )
  guided = jnp.asarray(v[0] + 1.5 * (v[1] - v[0]) + 2.5 * (v[2] - v[1]))
  np.testing.assert_allclose(
    out[0], edm.denoised(z[0], guided, sigma), rtol=1e-5, atol=1e-5
  )

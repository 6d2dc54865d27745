"""The loss of the diffusion task: each switch changes only what it names."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax.data import clip_record
from dicetalk_jax.training.diffusion_loss import emotion_discrimination
from tests import tiny
from tests.training.toy_loss import (
  DROP_EMOTION,
  DROP_IMAGE,
  B,
  C,
  F,
  H,
  batch,
  make_loss,
  near,
)

LAST_STEP = 10**9  # after all warmups


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation():
    yield


def loss_of(arg='default', data=None, step=LAST_STEP, **changes):
  """Computes the loss of a preset with changed settings, written `section__key`.

  Returns:
    The total, and its parts without those of the ranges of noise levels.
  """
  _, params, loss = make_loss(arg, **changes)
  if data is None:
    data = batch()
  total, parts = loss(params, data, jax.random.key(3), jnp.int32(step))
  return float(total), whole_parts(parts)


def whole_parts(parts):
  values = {}
  for name, value in parts.items():
    if name == 'per_row':
      values[name] = value
    elif '/' not in name:
      values[name] = float(value)
  return values


def without(parts, *names):
  """The parts without those named, and without what is given row by row."""
  left_out = {'per_row', *names}
  return {name: value for name, value in parts.items() if name not in left_out}


def test_the_loss_is_that_of_equation_15():
  total, parts = loss_of()
  denoise, classification, codebook = parts['denoise'], parts['cls'], parts['vq']
  assert total == pytest.approx(denoise + 0.05 * classification + codebook, rel=1e-6)
  first, _ = loss_of(step=0)
  warming_up = 0.05 / 1000 * classification
  assert first == pytest.approx(denoise + warming_up + codebook, rel=1e-6)
  assert codebook == pytest.approx(1.25 * parts['vq_error'], rel=1e-5)
  per_row = parts['per_row']
  assert set(per_row) == {'code', 'z', 'emotion_class'}
  rms = np.sqrt(np.square(per_row['z']).mean())
  np.testing.assert_allclose(parts['z_rms'], rms, rtol=1e-5)
  assert parts['codes_used'] == len(np.unique(per_row['code']))


@pytest.mark.parametrize('sigma', [0.01, 1.0, 100.0])
def test_denoising_loss_is_the_weighted_error_of_the_denoised_clip(sigma):
  """The loss of a network F is EDM's error of D (equations 7 and 8, table 1).

  The error is computed here in float64.
  """
  plain, params, _ = make_loss(noise__p_mean=float(np.log(sigma)), noise__p_std=0.0)
  loss = copy.copy(plain)
  data = batch()
  seen = []

  def network(array, scaled, reference, timestep):
    return array.tanh(0.6 * scaled - 0.3 * reference + 0.2 * timestep)

  class StandIn:
    context_kv = plain.models(params)['unet'].context_kv

    def __call__(self, sample, timestep, *_, **__):
      seen.append((sample, timestep))
      noise_level = timestep[:, None, None, None, None]
      v = network(jnp, sample[..., :C], sample[..., C:], noise_level)
      return v, v

  @jax.jit
  def denoise(params, data):
    _, parts = loss(params, data, jax.random.key(3), jnp.int32(0))
    return parts['denoise'], seen.pop()

  loss.models = lambda params: plain.models(params) | {'unet': StandIn()}
  ours, (sample, timestep) = denoise(params, data)
  np.testing.assert_allclose(timestep, np.log(sigma) / 4, rtol=1e-6)

  # The noise of the clip follows from what the network sees.
  x = 0.5 * np.float64(data['latents'])
  scaled = np.float64(sample[..., :C])
  z = np.sqrt(1 + sigma**2) * scaled
  noise = (z - x) / sigma
  assert abs(noise.mean()) < 0.2
  assert noise.std() == pytest.approx(1, abs=0.15)

  reference = np.float64(data['reference'])[:, None]
  f = network(np, scaled, reference, np.log(sigma) / 4)
  d = z / (1 + sigma**2) - sigma / np.sqrt(1 + sigma**2) * f
  weight = (1 + sigma**2) / sigma**2
  assert float(ours) == pytest.approx(weight * np.square(d - x).mean(), rel=1e-4)


@pytest.mark.parametrize(('name', 'counted'), [('denoise', 4), ('cls', 3)])
def test_ranges_of_noise_levels_add_up_to_the_whole(name, counted):
  """A clip without a label does not count in the discrimination."""
  _, params, loss = make_loss()
  _, parts = loss(params, batch(), jax.random.key(3), jnp.int32(0))
  pairs = [pair for key, pair in parts.items() if key.startswith(f'{name}/sigma_')]
  total, weight = map(float, sum(pairs))
  assert total / weight == near(float(parts[name]))
  assert weight == counted / 4


def test_abl_no_cls_drops_only_the_classification():
  total, parts = loss_of()
  less, same = loss_of('abl_no_cls')
  assert without(parts) == near(without(same))
  assert less == pytest.approx(total - 0.05 * parts['cls'], rel=1e-5)


def test_abl_no_prior_uses_the_mean():
  certain = batch(sigma=np.zeros((B, 6), np.float32))
  total, parts = loss_of('abl_no_prior')
  certain_total, certain_parts = loss_of(data=certain)
  assert without(parts) == near(without(certain_parts))
  assert total == near(certain_total)
  assert total == near(loss_of('abl_no_prior', certain)[0])
  assert total != near(loss_of()[0])


@pytest.mark.parametrize('arg', ['abl_no_bank', 'abl_learnable_ca', 'svp'])
def test_without_a_bank_nothing_is_looked_up(arg):
  total, parts = loss_of(arg)
  assert set(parts) == {'denoise', 'cls', 'cls_accuracy'}
  assert parts['denoise'] != near(loss_of()[1]['denoise'])
  lambda_cls = 0 if arg == 'svp' else 0.05
  expected = parts['denoise'] + lambda_cls * parts['cls']
  assert total == pytest.approx(expected, rel=1e-6)
  # A dropped emotion is not seen.
  zeros = np.zeros((B, 6), np.float32)
  _, dropped = loss_of(arg, batch(DROP_EMOTION, mu=zeros))
  _, other = loss_of(arg, batch(DROP_EMOTION, mu=zeros + 1))
  assert dropped == near(other)


def test_sonic_has_neither_emotion_nor_pose_guider():
  data = batch()
  for name in ('mu', 'sigma', 'emotion_class'):
    del data[name]
  total, parts = loss_of('sonic', data)
  assert set(parts) == {'denoise'}
  assert total == parts['denoise']
  assert loss_of('sonic', data | {'audio': data['audio'] + 1})[0] != near(total)

  loss, params, _ = make_loss('sonic')
  assert {name.partition('.')[0] for name in params} == {'unet', 'audio_linear'}
  arrays = {name: jnp.asarray(value) for name, value in data.items()}
  conditions = loss.conditions(params, arrays)
  assert conditions.emotion_tokens is None
  assert conditions.null_emotion is None
  assert conditions.spatial is None


def test_classification_of_clips_or_frames():
  _, frames = loss_of()
  _, clips = loss_of(loss__cls_pool='clip')
  classification = ('cls', 'cls_accuracy')
  assert without(frames, *classification) == near(without(clips, *classification))
  assert frames['cls'] != near(clips['cls'])
  # Both are the same for clips of one frame.
  plain = batch()
  one_frame = batch(latents=plain['latents'][:, :1], audio=plain['audio'][:, :1])
  _, frames = loss_of(data=one_frame)
  _, clips = loss_of(data=one_frame, loss__cls_pool='clip')
  assert frames['cls'] == pytest.approx(clips['cls'], rel=1e-6)


def evaluated(**changes):
  """Computes the total and the parts as evaluation does."""
  loss, params, _ = make_loss(**changes)
  program = jax.jit(functools.partial(loss, train=False))
  total, parts = program(params, batch(), jax.random.key(3), jnp.int32(LAST_STEP))
  return {'total': float(total), **without(whole_parts(parts))}


def test_evaluation_measures_what_sampling_does():
  """The whole bank, the mean of each prior and a clean reference, even where training
  sees none of them; and no dropout.
  """
  as_sampled = dict(emotion__p_whole_bank=1.0, emotion__sample=False)
  training_only = dict(emo_model__dropout=0.5, noise__ref_aug='lognormal')
  total, parts = loss_of(**as_sampled)
  expected = near({'total': total, **without(parts)})
  for setting in ({}, as_sampled, training_only):
    assert evaluated(**setting) == expected
    trained_total, _ = loss_of(**setting)
    assert (trained_total == near(total)) == (setting == as_sampled)


def test_the_frame_rate_follows_the_step():
  for step, fps in ((1, 25.0), (2, 12.5), (5, 5.0)):
    loss, params, _ = make_loss(data__step=step)
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


def test_noise_on_the_reference_changes_the_denoising():
  plain, parts = loss_of()
  noisy, noisy_parts = loss_of(noise__ref_aug='lognormal')
  assert plain != near(noisy)
  assert parts['vq'] == near(noisy_parts['vq'])
  # A dropped reference has no noise.
  _, unseen = loss_of(data=batch(DROP_IMAGE))
  _, noisy_unseen = loss_of(data=batch(DROP_IMAGE), noise__ref_aug='lognormal')
  assert without(unseen) == near(without(noisy_unseen))


def test_strength_of_the_noise_on_the_reference():
  loss, _, _ = make_loss()
  noise = loss._disturbed(jnp.zeros((2000, 4, 4, 2)), jax.random.key(0))
  # In units of scaled latents.
  strength = np.log(0.5 * np.asarray(noise).std((1, 2, 3)))
  assert strength.mean() == pytest.approx(-3, abs=0.1)
  assert strength.std() == pytest.approx(0.5, abs=0.1)


def test_null_keys_matter_only_where_the_emotion_is_dropped():
  def totals(data):
    kinds = ('released', 'zeros', 'bank')
    return [loss_of(data=data, emo_model__null_kv=kind)[0] for kind in kinds]

  kept = totals(batch())
  assert kept == near([kept[0]] * 3)
  released, zeros, bank = totals(batch(DROP_EMOTION))
  assert released == near(zeros)
  assert released != near(bank)


def test_dropped_emotions_change_only_the_bank():
  """Neither the prior nor the label of such a clip changes anything else."""
  total, parts = loss_of(data=batch(DROP_EMOTION))
  other_mu = batch()['mu'] + 1
  other_total, other = loss_of(data=batch(DROP_EMOTION, mu=other_mu))
  assert parts['cls'] == parts['cls_accuracy'] == 0
  assert parts['denoise'] == other['denoise']
  assert parts['vq'] != near(other['vq'])
  assert other_total != near(total)

"""The sampler against the loop of the reference implementation.

That loop is written naively, in NumPy around a toy network (`naive`), and in JAX for
any network (`reference_sampler`).
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax.diffusion import sampler, schedule
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models import parameters
from dicetalk_jax.models.attention import KeyValue
from tests.diffusion.reference_sampler import clip_of_batch, make_reference_sampler

CONFIG = sampler.SamplerConfig(
  num_steps=3, frames=5, shift=2, g_image=(2.0, 3.0), g_condition=5.0
)
SONIC = dataclasses.replace(CONFIG, padding=False, shift=4)
OVERLAP = dataclasses.replace(CONFIG, frames=4, overlap=1, shift=3)
N, K, D, H, W, C = 12, 3, 6, 2, 3, 4


class Toy(nnx.Module):
  """Mixes frames, branches and conditions in the ways that the UNet can.

  Counts how often it is traced.
  """

  traces = 0

  def __init__(self, rngs):
    self.mix = nnx.Param(jax.random.normal(rngs.params(), (2 * C, C)) * 0.4)
    self.key = nnx.Param(jax.random.normal(rngs.params(), (3, D, C)) * 0.3)

  def context_kv(self, *contexts):
    return {
      'attn2': tuple(
        KeyValue(jnp.tanh(x @ w), x @ w) for x, w in zip(contexts, self.key.get_value())
      )
    }

  def __call__(
    self, sample, timestep, kv, ids, spatial_condition, masks, adapter_scales
  ):
    Toy.traces += 1
    return toy(
      jnp,
      self.mix.get_value(),
      sample,
      timestep,
      kv['attn2'],
      ids,
      spatial_condition,
      masks,
      adapter_scales,
    ), None


def toy(np, mix, sample, timestep, kv, ids, spatial, masks, scales):
  """The same in NumPy and JAX. All arguments are rows `[R, F, ...]`."""
  image, *adapters = (
    (k * v).mean(-2)[:, :, None, None] for k, v in kv
  )  # [R, F or 1, 1, 1, C]
  mask = masks[0].reshape(len(sample), 1, H, W, 1)
  x = (
    sample @ mix
    + (0 if spatial is None else spatial)
    + image
    + mask * sum(s * a for s, a in zip(scales, adapters))
  )
  across_frames = np.cumsum(x, axis=1) / 5
  return np.tanh(
    across_frames + timestep * 0.1 + ids.sum(-1)[:, None, None, None, None] * 0.01
  )


def inputs(batch, frames, seed=0):
  def draw(*shape):
    return jnp.float32(np.random.default_rng([seed, *shape]).normal(size=shape))

  conditions = sampler.Conditions(
    reference_latents=draw(batch, H, W, C),
    image_token=draw(batch, 1, D),
    audio_tokens=draw(batch, N, K, D),
    null_audio=draw(K, D),
    emotion_tokens=draw(batch, K, D),
    null_emotion=draw(K, D) * 0.3,
    masks=(jnp.abs(draw(batch, H * W)),),
    spatial=draw(batch, H, W, C),
    added_time_ids=draw(batch, 3),
  )
  return conditions, draw(batch, N + frames, H, W, C)


def without_emotion(conditions):
  """As Sonic has them: neither emotion nor pose, and time ids for every frame."""
  ids = jnp.float32(
    np.random.default_rng(1).normal(size=(len(conditions.image_token), N, 3))
  )
  return conditions.replace(
    emotion_tokens=None, null_emotion=None, spatial=None, added_time_ids=ids
  )


def naive(params, config, c, noise, length):
  """The reference implementation's loop for one clip, Sonic's if there is no padding.

  Conditions have no batch axis.
  """
  key = np.asarray(params['key'])
  total = length + config.padding_frames
  sigmas = schedule.karras_sigmas(config.num_steps)

  def kv(tokens, w):
    return (np.tanh(tokens @ w), tokens @ w)

  def row(*parts):
    return np.stack([np.broadcast_to(p, parts[-1].shape) for p in parts])

  x = config.scaling_factor * c.reference_latents + noise[:total] * sigmas[0]
  shift = 0
  for step, (sigma, below) in enumerate(zip(sigmas[:-1], sigmas[1:])):
    sums, counts = np.zeros_like(x), np.zeros(total)
    for start in range(0, total, config.frames - config.overlap):
      frames = [(start - shift + j) % total for j in range(config.frames)]
      audio = np.stack(
        [c.audio_tokens[i] if i < length else c.null_audio for i in frames]
      )
      z = x[frames]
      reference = row(z * 0, *[np.broadcast_to(c.reference_latents, z.shape)] * 2)
      sample = np.concatenate(
        [row(*[z / np.sqrt(sigma**2 + 1)] * 3), reference], axis=-1
      )
      contexts = [
        row(c.image_token * 0, c.image_token, c.image_token)[:, None],
        row(c.null_audio, c.null_audio, audio),
      ]
      spatial, ids = None, c.added_time_ids
      if config.padding:
        emotion = np.stack(
          [c.emotion_tokens if i < length else c.null_emotion for i in frames]
        )
        contexts += [row(c.null_emotion, c.null_emotion, emotion)]
        spatial = c.spatial[None, None]
      else:
        ids = ids[frames].mean(0)
      u, m, v = toy(
        np,
        np.asarray(params['mix']),
        sample,
        0.25 * np.log(sigma),
        [kv(t, w) for t, w in zip(contexts, key)],
        row(*[ids] * 3),
        spatial,
        [row(*[c.masks[0]] * 3)],
        config.adapter_scales,
      )
      g1, g2 = (np.linspace(*g, config.num_steps)[step] for g in ((2, 3), (5, 5)))
      guided = u + g1 * (m - u) + g2 * (v - m)
      clean = -guided * sigma / np.sqrt(sigma**2 + 1) + z / (sigma**2 + 1)
      np.add.at(sums, frames, z + (z - clean) / sigma * (below - sigma))
      np.add.at(counts, frames, 1)
    x = sums / counts[:, None, None, None]
    shift += config.shift
    if config.padding:
      shift %= config.frames
  return x


@pytest.fixture(scope='module')
def network():
  return parameters.split(Toy(parameters.ParamKeys(jax.random.key(0))))


@pytest.fixture(scope='module')
def sample(network):
  """One compiled sampler per configuration, for all tests."""
  made = {}
  return lambda config: made.setdefault(
    config, sampler.make_sampler(network[0], config)
  )


def clip(conditions, b):
  """One clip of a batch in float64, without the batch axis."""
  double = jax.tree.map(lambda x: np.asarray(x, np.float64), conditions)
  return clip_of_batch(double, b)


@pytest.mark.parametrize('config', [CONFIG, OVERLAP], ids=['wrap', 'overlap'])
def test_equals_the_reference_loop(network, sample, config):
  """Two clips of unequal length in one batch.

  12 + 5 frames revisit three frames; 7 + 4 overlap.
  """
  conditions, noise = inputs(2, config.frames)
  out = sample(config)(network[1], noise, conditions, jnp.array([12, 7]))
  assert out.shape == noise.shape and out.dtype == jnp.float32
  for b, length in enumerate([12, 7]):
    expected = naive(
      network[1], config, clip(conditions, b), np.asarray(noise[b], np.float64), length
    )
    np.testing.assert_allclose(
      out[b, : length + config.frames], expected, atol=2e-5 * expected.std()
    )
    assert not np.any(out[b, length + config.frames :])


@pytest.mark.parametrize(
  'lengths', [[12, 7], [3, 1]], ids=['wrap', 'shorter than a window']
)
def test_equals_the_loop_of_sonic(network, sample, lengths):
  """Windows wrap onto the start.

  Shifts of 0, 4, 8 differ from shifts of 0, 4, 3 in clips that 5 does not divide.
  """
  conditions, noise = inputs(2, SONIC.padding_frames)
  conditions = without_emotion(conditions)
  out = sample(SONIC)(network[1], noise, conditions, jnp.array(lengths))
  assert out.shape == (2, N, H, W, C)
  for b, length in enumerate(lengths):
    expected = naive(
      network[1], SONIC, clip(conditions, b), np.asarray(noise[b], np.float64), length
    )
    np.testing.assert_allclose(out[b, :length], expected, atol=2e-5 * expected.std())
    assert not np.any(out[b, length:])


@pytest.mark.parametrize(
  'config', [CONFIG, OVERLAP, SONIC], ids=['wrap', 'overlap', 'sonic']
)
def test_equals_the_order_of_the_reference_implementation(network, sample, config):
  conditions, noise = inputs(2, config.padding_frames)
  if config is SONIC:
    conditions = without_emotion(conditions)
  expected = sample(config)(network[1], noise, conditions, jnp.array([12, 7]))
  run = make_reference_sampler(network[0], config)
  out = run(network[1], noise, conditions, jnp.array([12, 7]))
  np.testing.assert_allclose(out, expected, atol=1e-5 * np.std(expected))
  halfway = run(network[1], noise, conditions, jnp.array([12, 7]), 0, 2)
  np.testing.assert_array_equal(
    run(network[1], halfway, conditions, jnp.array([12, 7]), 2, 3), out
  )


@pytest.mark.parametrize('config', [CONFIG, SONIC], ids=['emotion', 'sonic'])
def test_an_image_weight_of_one_costs_two_branches(network, config):
  """It skips the one that cancels out, and agrees with a weight that hardly differs."""
  conditions, noise = inputs(2, config.padding_frames)
  if not config.padding:
    conditions = without_emotion(conditions)
  lengths = jnp.array([12, 7])
  one = dataclasses.replace(config, g_image=1.0)
  almost = dataclasses.replace(config, g_image=(1.0, 1.0 + 1e-6))
  programs = {}
  results = {}
  for rows, setting in ((2, one), (3, almost)):
    sample = sampler.make_sampler(network[0], setting)
    args = (network[1], noise, conditions, lengths)
    programs[rows] = sample.lower(*args).as_text()
    results[rows] = sample(*args)
  windows = 4 if config.padding else 3
  for rows, program in programs.items():
    assert f'tensor<{2 * windows * rows}x5x{H}x{W}x{2 * C}xf32>' in program
  spread = float(results[3].std())
  np.testing.assert_allclose(results[2], results[3], atol=1e-4 * spread)


def test_clips_are_joined_to_a_batch():
  conditions, _ = inputs(3, CONFIG.frames)
  constants = dict(
    null_audio=conditions.null_audio, null_emotion=conditions.null_emotion
  )
  single = [
    jax.tree.map(lambda x, i=i: x[i : i + 1], conditions).replace(**constants)
    for i in range(3)
  ]
  joined = sampler.join_conditions(single)
  jax.tree.map(np.testing.assert_array_equal, joined, conditions)
  without = [without_emotion(clip) for clip in single]
  assert sampler.join_conditions(without).emotion_tokens is None


def test_lengths_are_data(network, sample):
  """Another length compiles nothing; a larger bucket gives the same result."""
  conditions, noise = inputs(1, CONFIG.frames)
  run = sample(CONFIG)
  run(network[1], noise, conditions, jnp.array([12]))
  traces = Toy.traces
  out = run(network[1], noise, conditions, jnp.array([7]))
  assert Toy.traces == traces
  tight = run(
    network[1],
    noise[:, : 7 + CONFIG.frames],
    conditions.replace(audio_tokens=conditions.audio_tokens[:, :7]),
    jnp.array([7]),
  )
  np.testing.assert_allclose(out[:, :12], tight, atol=1e-5)


def test_step_by_step(network, sample):
  """One step at a time, as for a progress bar: nothing compiles, nothing changes."""
  conditions, noise = inputs(1, CONFIG.frames)
  lengths = jnp.array([10])
  whole = sample(CONFIG)(network[1], noise, conditions, lengths, 0, 3)
  traces = Toy.traces
  x = noise
  for step in range(CONFIG.num_steps):
    x = sample(CONFIG)(network[1], x, conditions, lengths, step, step + 1)
  assert Toy.traces == traces
  np.testing.assert_array_equal(x, whole)


@pytest.mark.parametrize('per_call', [1, 3])
def test_windows_per_call(network, sample, per_call):
  conditions, noise = inputs(2, CONFIG.frames)
  lengths = jnp.array([12, 3])
  whole = sample(CONFIG)(network[1], noise, conditions, lengths)
  parts = sample(dataclasses.replace(CONFIG, windows_per_call=per_call))(
    network[1], noise, conditions, lengths
  )
  np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_windows_over_eight_devices(network, sample, mesh):
  conditions, noise = inputs(1, CONFIG.frames)
  lengths = jnp.array([11])
  spread = sampler.make_sampler(network[0], CONFIG, mesh)
  args = jax.device_put(
    (network[1], noise, conditions, lengths), jax.NamedSharding(mesh, jax.P())
  )
  program = spread.lower(*args).compile().as_text()
  # A device multiplies 1 window x 3 branches.
  assert f'f32[{3 * 5 * H * W},{C}]{{1,0}} dot' in program
  np.testing.assert_allclose(
    spread(*args), sample(CONFIG)(network[1], noise, conditions, lengths), atol=1e-5
  )


def test_strength_starts_late(network, sample):
  """Two thirds of three steps: start at the second level, with the last two steps."""
  config = dataclasses.replace(CONFIG, strength=0.67)
  assert config.steps_run == 2
  conditions, noise = inputs(1, CONFIG.frames)
  out = sample(config)(network[1], noise, conditions, jnp.array([12]), 0, 0)
  start = (
    0.18215 * conditions.reference_latents[:, None]
    + noise * schedule.karras_sigmas(3)[1]
  )
  np.testing.assert_allclose(out, start, rtol=1e-6)


def test_noise_belongs_to_clip_and_frame():
  keys = jax.random.split(jax.random.key(0), 2)
  conditions, _ = inputs(2, CONFIG.frames)
  noise = sampler.draw_noise(keys, conditions, CONFIG.frames)
  assert (
    noise.shape == (2, N + CONFIG.frames, H, W, C) and abs(float(noise.std()) - 1) < 0.1
  )
  short, _ = inputs(1, CONFIG.frames)
  short = short.replace(audio_tokens=short.audio_tokens[:, :4])
  np.testing.assert_array_equal(
    sampler.draw_noise(keys[1:], short, CONFIG.frames)[0], noise[1, : 4 + CONFIG.frames]
  )


@pytest.mark.parametrize(
  'wrong',
  [dict(overlap=5), dict(num_steps=0), dict(strength=0.0), dict(windows_per_call=0)],
)
def test_impossible_settings(wrong):
  with pytest.raises(ConfigError):
    dataclasses.replace(CONFIG, **wrong)

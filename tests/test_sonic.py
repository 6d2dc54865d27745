"""Sonic through the pipeline: no emotion, no padding, time ids of every window from
speech and portrait.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax import bundle
from dicetalk_jax.errors import ConfigError, InputError, WeightsError
from dicetalk_jax.media import audio
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.pipeline import Pipeline
from dicetalk_jax.settings import Settings
from tests import tiny


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation():
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny.shared_sonic(tmp_path_factory)


@pytest.fixture(scope='module')
def pipe(folder):
  return Pipeline.load(folder)


@pytest.fixture(scope='module')
def clip(pipe):
  job = pipe.job(tiny.portrait(), tiny.speech(), face_box=tiny.FACE_BOX)
  return pipe.conditions(job)


def model(folder, name):
  config, params = bundle.load_component(folder, name)
  return parameters.merge(
    parameters.abstract(registry.builder(name, config))[0], params
  )


def test_generates(pipe):
  def video(wave=None, seed=3):
    wave = tiny.speech() if wave is None else wave
    return pipe.generate(tiny.portrait(), wave, face_box=tiny.FACE_BOX, seed=seed)

  frames, fps = video()
  assert frames.shape == (10, 20, 16, 3)
  assert frames.dtype == np.uint8
  assert fps == 12.5
  assert frames.std() > 1
  np.testing.assert_array_equal(video()[0], frames)
  for other in (video(seed=4), video(tiny.speech()[::-1])):
    assert (other[0] != frames).mean() > 0.01
  assert pipe._sample.func._cache_size() == 1


def test_conditions(clip):
  conditions, length = clip
  assert length == 10
  assert conditions.audio_tokens.shape[1] == 16
  assert conditions.added_time_ids.shape[1] == 16
  assert conditions.emotion_tokens is None
  assert conditions.null_emotion is None
  assert conditions.spatial is None
  assert [mask.shape for mask in conditions.masks] == [(1, 80)]


def test_time_ids(pipe, folder, clip):
  """For each frame: 50 positions of Whisper's last state, 24 of them before its own,
  and the CLIP embedding.
  """
  conditions, length = clip
  wave = tiny.speech()
  states = np.asarray(model(folder, 'whisper')(jnp.asarray(audio.log_mel(wave))))
  last = states[0, : 2 * audio.audio_len(len(wave)), -1]
  padded = np.concatenate([np.zeros((24, 8)), last, np.zeros((26, 8))])
  predict = model(folder, 'audio2bucket')
  image = jnp.asarray(conditions.image_token)[:, 0]
  for i, ids in enumerate(np.asarray(conditions.added_time_ids)[0, :length]):
    motion = predict(jnp.float32(padded[None, None, 4 * i : 4 * i + 50]), image)[0, 0]
    np.testing.assert_allclose(ids, [12.5, *(16 * motion + 16)], rtol=1e-5)


def test_nothing_is_sampled_behind_the_clip(pipe, clip):
  conditions, length = clip
  latents = pipe.sample(conditions, [length], jax.random.key(0)[None])
  assert latents.shape == (1, 16, 10, 8, 4)
  assert np.any(latents[0, 9])
  assert not np.any(latents[0, 10:])
  assert pipe.decode(latents[0], length).shape == (10, 20, 16, 3)


def test_the_portrait_is_encoded_in_the_compute_type(pipe, tmp_path_factory, folder):
  """In float32 by DICE-Talk, whose tiny autoencoder is the same."""
  pixels = np.float32(tiny.portrait()[None] / 127.5 - 1)

  def encode(folder):
    half = Pipeline.load(folder, dtype=jnp.bfloat16)
    return np.asarray(half.encoder.stages['vae'](pixels))

  exact = np.asarray(pipe.encoder.stages['vae'](pixels))
  np.testing.assert_array_equal(encode(tiny.shared_model(tmp_path_factory)), exact)
  error = np.sqrt(np.square(encode(folder) - exact).mean()) / exact.std()
  assert 1e-3 < error < 0.05  # measured 0.017


def test_refusals(pipe, folder, tmp_path):
  with pytest.raises(InputError, match='has no emotions; leave --emotion out'):
    pipe.generate(tiny.portrait(), tiny.speech(), emotion='happy')
  with pytest.raises(InputError, match='has no emotions'):
    pipe.job(tiny.portrait(), tiny.speech(), prior=np.zeros(6))
  with pytest.raises(WeightsError, match='has no audio2bucket'):
    Pipeline.load(tiny.model_without(folder, tmp_path, 'audio2bucket'))
  bundle.save_settings(tmp_path, {'kind': 'opera'})
  with pytest.raises(
    ConfigError, match="kind 'opera', but only dicetalk, sonic are known"
  ):
    Settings.of(tmp_path)

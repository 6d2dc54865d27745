"""The pipeline on a tiny model: stages put together, buckets, meshes, decoding in
chunks, interpolation.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dicetalk_jax import bundle, parallel
from dicetalk_jax.component import Component
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.models import parameters, registry, rife
from dicetalk_jax.pipeline import Pipeline, Settings
from tests import tiny
from tests.diffusion import reference_sampler


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  with tiny.quick_compilation():
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny.shared_model(tmp_path_factory)


@pytest.fixture(scope='module')
def pipe(folder):
  return Pipeline.load(folder)


@pytest.fixture(scope='module')
def video(pipe):
  calls = []
  frames, fps = pipe.generate(
    tiny.portrait(),
    tiny.speech(),
    emotion='happy',
    face_box=tiny.FACE_BOX,
    seed=3,
    interpolate=False,
    progress=lambda *call: calls.append(call),
  )
  return frames, fps, calls


def programs(pipe):
  """How many programs the sampler and the decoder have been compiled to."""
  return [
    program._cache_size() for program in (pipe._sample.func, pipe._decode.args[0])
  ]


def test_generates(video):
  frames, fps, calls = video
  assert (
    frames.shape == (10, 20, 16, 3) and frames.dtype == np.uint8 and fps == 12.5
  )  # 0.8 s; 80x64 pixels
  assert frames.std() > 1
  assert [c for c in calls if c[0] == 'sampling'] == [
    ('sampling', i, 2) for i in range(3)
  ]
  assert calls[-1] == ('decoding', 4, 4)  # 10 frames need 12, in chunks of 3


def test_seed_emotion_and_speech_matter(pipe, video):
  """The same seed gives the same video, with or without progress; each condition
  changes it.
  """

  def again(wave=None, emotion='happy', seed=3, box=tiny.FACE_BOX):
    wave = tiny.speech() if wave is None else wave
    return pipe.generate(
      tiny.portrait(), wave, emotion=emotion, face_box=box, seed=seed, interpolate=False
    )[0]

  np.testing.assert_allclose(again().astype(int), video[0].astype(int), atol=1)
  for other in (
    again(seed=4),
    again(emotion='sad'),
    again(wave=tiny.speech()[::-1]),
    again(box=(0.0, 0.0, 9.0, 9.0)),
  ):
    assert (other != video[0]).mean() > 0.01
  assert len(again(wave=tiny.speech(1.2))) == 15
  assert programs(pipe) == [1, 1]  # for all of this, and the video with progress


def test_lengths_of_a_bucket_share_programs(pipe):
  """Windows of 4 frames make buckets of 4, 8, 16, ... frames."""
  assert [pipe._bucket(n) for n in (1, 4, 5, 8, 9, 17)] == [4, 4, 8, 8, 16, 32]
  shapes = set()
  for seconds in (0.75, 0.8, 1.2):
    conditions, length = pipe.conditions(
      tiny.portrait(), tiny.speech(seconds), pipe.prior('sad'), tiny.FACE_BOX
    )
    assert length == int(seconds * 12.5)
    shapes.add(str(jax.tree.map(jnp.shape, conditions)))
  assert len(shapes) == 1


def test_conditions_follow_the_settings(pipe, folder):
  conditions, _ = pipe.conditions(
    tiny.portrait(), tiny.speech(), pipe.prior('sad'), tiny.FACE_BOX
  )
  assert conditions.added_time_ids.tolist() == [[12.5, 8, 16]]
  assert conditions.reference_latents.shape == (1, 10, 8, 4)
  assert [m.shape for m in conditions.masks] == [(1, 80)]
  assert (
    pipe.settings.sampler.scaling_factor == 0.5 and pipe.settings.sampler.num_steps == 2
  )
  changed = Settings.of(folder, num_steps=7)
  assert changed.sampler == dataclasses.replace(
    pipe.settings.sampler, num_steps=7, scaling_factor=0.18215
  )
  assert Settings.of(folder / 'nowhere') == Settings()


def test_decodes_in_chunks_with_padding_frames(pipe, folder):
  """Chunks of 3 from frame 0, each by itself; the last one may be cut by the end of
  the latents.
  """
  graphdef, _ = parameters.abstract(registry.builder('vae', tiny.CONFIGS['vae']))
  params = bundle.load_component(folder, 'vae')[1]
  decode = jax.jit(
    lambda params, z: parameters.merge(graphdef, params).decode(z[None] / 0.5)[0]
  )
  z = np.float32(np.random.default_rng(0).normal(size=(7, 10, 8, 4)))
  for length, frames in ((3, 7), (7, 7), (4, 6)):
    expected = np.concatenate(
      [decode(params, z[i : min(i + 3, frames)]) for i in range(0, frames, 3)]
    )[:length]
    expected = 255 * np.clip(expected * 0.5 + 0.5, 0, 1)
    ours = pipe.decode(z[:frames], length)
    assert ours.shape == (length, 20, 16, 3)
    assert (
      np.abs(ours - np.floor(expected)).max() <= 1
      and (ours == np.floor(expected)).mean() > 0.99
    )


def test_interpolates(pipe, folder, video):
  """Between every two frames, those of neighbouring chunks too, one more; half the
  pictures are those without.
  """
  frames, fps = pipe.generate(
    tiny.portrait(), tiny.speech(), emotion='happy', face_box=tiny.FACE_BOX, seed=3
  )
  assert frames.shape == (19, 20, 16, 3) and frames.dtype == np.uint8 and fps == 25
  np.testing.assert_array_equal(frames[::2], video[0])
  graphdef, _ = parameters.abstract(
    registry.builder('flownet', tiny.CONFIGS['flownet'])
  )
  params = bundle.load_component(folder, 'flownet')[1]
  expected = jax.jit(
    lambda params, x: rife.double(parameters.merge(graphdef, params), x)
  )(params, video[0] / np.float32(255))
  assert (
    np.abs(frames - 255 * expected).max() < 3
  )  # those were computed from whole levels
  assert pipe.decode(
    np.zeros((4, 10, 8, 4), np.float32), 1, interpolate=True
  ).shape == (1, 20, 16, 3)


def test_the_order_of_the_reference_implementation_agrees(pipe):
  """What the pipeline leaves out changes nothing but the last bits.

  The reference implementation guides the face in every frame, samples one window after
  the other, and decodes all padding frames.
  """
  conditions, length = pipe.conditions(
    tiny.portrait(), tiny.speech(), pipe.prior('happy'), tiny.FACE_BOX
  )
  total = length + pipe.settings.sampler.padding_frames
  assert conditions.spatial.shape == (1, 10, 8, 8) and total == 14
  bucket = (1, 20, 10, 8, 4)  # of 16 frames, and the padding
  noise = np.float32(np.random.default_rng(0).normal(size=bucket))
  ours = np.asarray(pipe.denoise(noise, conditions, [length]))[:, :total]

  unet = pipe.networks['unet']
  sample = reference_sampler.make_sampler(unet.graphdef, pipe.settings.sampler)
  every_frame = np.broadcast_to(
    conditions.spatial, (1, total, *conditions.spatial.shape[1:])
  )
  expected = sample(
    unet.params, noise, conditions.replace(spatial=every_frame), [length]
  )[:, :total]
  rounding = np.spacing(700 * np.abs(noise).max())  # at the first noise level
  np.testing.assert_allclose(ours, expected, atol=rounding)

  all_frames = pipe.decode(ours[0], total, rounded=False)
  np.testing.assert_array_equal(
    pipe.decode(ours[0], length, rounded=False), all_frames[:length]
  )


def test_reconstructs(pipe):
  frames = np.random.default_rng(0).integers(0, 255, (4, 20, 16, 3), np.uint8)
  assert pipe.reconstruct(frames).shape == frames.shape


def test_half_precision_over_a_mesh(folder, video):
  """Windows and chunks over eight devices, in bfloat16 but for the latents:
  rounding, not another picture.
  """
  pipe = Pipeline.load(folder, parallel.make_mesh(data=-1, fsdp=1), jnp.bfloat16)
  assert pipe.networks['unet'].params['conv_in.kernel'].dtype == jnp.bfloat16
  assert pipe.networks['whisper'].params['encoder.conv1.kernel'].dtype == jnp.float32
  assert pipe.networks['flownet'].params['block0.conv0.0.0.kernel'].dtype == jnp.float32
  frames, _ = pipe.generate(
    tiny.portrait(),
    tiny.speech(),
    emotion='happy',
    face_box=tiny.FACE_BOX,
    seed=3,
    progress=lambda *_: None,
  )
  assert programs(pipe) == [1, 1] and len(frames) == 19
  squared = np.square(frames[::2].astype(float) - video[0]).mean(axis=(1, 2, 3))
  psnr = 10 * np.log10(255**2 / squared)
  assert psnr.min() > 36  # dB; measured 37.9, and 39.5 over all frames
  conditions, length = pipe.conditions(
    tiny.portrait(), tiny.speech(), pipe.prior('happy'), tiny.FACE_BOX
  )
  assert pipe.sample(conditions, [length], jax.random.key(3)[None]).dtype == jnp.float32


def test_refusals(pipe, folder, tmp_path):
  with pytest.raises(WeightsError, match='it has: happy, sad'):
    pipe.generate(tiny.portrait(), tiny.speech(), emotion='bored')
  with pytest.raises(InputError, match='needs an emotion'):
    pipe.generate(tiny.portrait(), tiny.speech())
  with pytest.raises(WeightsError, match='prior has 9 numbers, the model wants 6'):
    pipe.conditions(tiny.portrait(), tiny.speech(), np.zeros(9), tiny.FACE_BOX)
  with pytest.raises(InputError, match='less than one frame'):
    pipe.conditions(
      tiny.portrait(), tiny.speech(0.05), pipe.prior('sad'), tiny.FACE_BOX
    )
  with pytest.raises(InputError, match='no face'):
    pipe.conditions(tiny.portrait(), tiny.speech(), pipe.prior('sad'))
  with pytest.raises(WeightsError, match='no model folder'):
    Pipeline.load(tmp_path)
  less = Pipeline(
    tiny.model_without(folder, tmp_path, 'flownet'),
    {name: network for name, network in pipe.networks.items() if name != 'flownet'},
    pipe.settings,
  )
  with pytest.raises(WeightsError, match='has no flownet'):
    less.generate(tiny.portrait(), tiny.speech(), emotion='happy', interpolate=True)


def test_parameters_must_fit_their_configuration(folder, tmp_path):
  config, params = bundle.load_component(folder, 'audio_linear')
  bundle.save_component(tmp_path, 'audio_linear', config | {'channels': 9}, params, {})
  with pytest.raises(WeightsError, match='parameters of audio_linear do not fit'):
    Component.load(tmp_path, 'audio_linear')

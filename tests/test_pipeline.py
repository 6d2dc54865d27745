"""The pipeline on a tiny model: stages put together, buckets, meshes, decoding in
chunks, interpolation.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import naming
from dicetalk_jax import bundle, parallel
from dicetalk_jax.component import Component
from dicetalk_jax.conditioning import ConditionEncoder
from dicetalk_jax.errors import InputError, WeightsError
from dicetalk_jax.models import parameters, registry, rife
from dicetalk_jax.pipeline import Pipeline
from dicetalk_jax.settings import Settings
from tests import tiny
from tests.diffusion import reference_sampler
from tests.models import emotion_twin


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
  """Frames, their rate, and the calls of the progress function."""
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


def conditions_of(pipe, wave=None, emotion='sad'):
  """Conditions, and the number of frames."""
  wave = tiny.speech() if wave is None else wave
  job = pipe.job(tiny.portrait(), wave, emotion, face_box=tiny.FACE_BOX)
  return pipe.conditions(job)


def count_programs(pipe):
  """How many programs the sampler and the decoder have been compiled to."""
  sampler = pipe._sample.func
  (decoder,) = pipe.decoder.decode_chunks.args
  return sampler._cache_size(), decoder._cache_size()


def component(folder, name):
  """Structure and parameters."""
  builder = registry.builder(name, tiny.CONFIGS[name])
  return parameters.abstract(builder)[0], bundle.load_component(folder, name)[1]


def test_generates(video):
  frames, fps, calls = video
  assert frames.shape == (10, 20, 16, 3)  # 0.8 s; an image of 80x64 pixels
  assert frames.dtype == np.uint8
  assert fps == 12.5
  assert frames.std() > 1
  sampling = [call for call in calls if call[0] == 'sampling']
  assert sampling == [('sampling', done, 2) for done in range(3)]
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
  others = [
    again(seed=4),
    again(emotion='sad'),
    again(wave=tiny.speech()[::-1]),
    again(box=(0.0, 0.0, 9.0, 9.0)),
  ]
  for other in others:
    assert (other != video[0]).mean() > 0.01
  assert len(again(wave=tiny.speech(1.2))) == 15
  assert count_programs(pipe) == (1, 1)  # for all of this, and the video with progress


def test_lengths_of_a_bucket_share_programs(pipe):
  """Windows of 4 frames make buckets of 4, 8, 16, ... frames."""
  buckets = [pipe.encoder.bucket(length) for length in (1, 4, 5, 8, 9, 17)]
  assert buckets == [4, 4, 8, 8, 16, 32]
  shapes = set()
  for seconds in (0.75, 0.8, 1.2):
    conditions, length = conditions_of(pipe, tiny.speech(seconds))
    assert length == int(seconds * 12.5)
    shapes.add(str(jax.tree.map(jnp.shape, conditions)))
  assert len(shapes) == 1


def test_conditions_follow_the_settings(pipe):
  conditions, _ = conditions_of(pipe)
  assert conditions.added_time_ids.tolist() == [[12.5, 8, 16]]
  assert conditions.reference_latents.shape == (1, 10, 8, 4)
  assert [mask.shape for mask in conditions.masks] == [(1, 80)]


def test_with_retrieval_no_emotion_is_looked_up_like_any_emotion(pipe, folder):
  """Tokens, and so the video, are those of a PyTorch twin that is called on the prior
  and on a zero prior; nothing is masked.
  """
  settings = dataclasses.replace(pipe.settings, retrieval=True)
  encoder = ConditionEncoder(pipe.networks, settings)
  job = pipe.job(tiny.portrait(), tiny.speech(), 'sad', face_box=tiny.FACE_BOX)
  conditions, length = encoder.encode(job)

  emo_model = pipe.networks['emo_model']
  twin = emotion_twin.Twin(emo_model.config)
  weights = naming.to_torch(emo_model.params)
  twin.load_state_dict({key: torch.tensor(np.array(x)) for key, x in weights.items()})
  prior = torch.tensor(np.float32(job.prior))
  with torch.no_grad():
    priors = torch.stack([prior, torch.zeros_like(prior)])
    tokens, _ = twin(priors, retrieval=True, drop=torch.zeros(2, dtype=torch.bool))
  expected = conditions.replace(
    emotion_tokens=tokens[:1].numpy(), null_emotion=tokens[1].numpy()
  )

  def sample(conditions):
    return np.asarray(pipe.sample(conditions, [length], jax.random.key(0)[None]))

  rounding = np.spacing(np.float32(700 * 4))  # at the first noise level
  np.testing.assert_allclose(sample(conditions), sample(expected), atol=rounding)


def test_settings_are_those_of_the_folder(pipe, folder):
  """The scaling factor is that of the autoencoder."""
  assert pipe.settings.sampler.scaling_factor == 0.5
  assert pipe.settings.sampler.num_steps == 2
  changed = Settings.of(folder, num_steps=7)
  assert changed.sampler == dataclasses.replace(pipe.settings.sampler, num_steps=7)
  assert Settings.of(folder / 'nowhere') == Settings()


def test_decodes_in_chunks_with_padding_frames(pipe, folder):
  """Chunks of 3 from frame 0, each by itself; the last one may be cut by the end of
  the latents.
  """
  graphdef, params = component(folder, 'vae')
  decode = jax.jit(
    lambda params, z: parameters.merge(graphdef, params).decode(z[None] / 0.5)[0]
  )
  z = np.float32(np.random.default_rng(0).normal(size=(7, 10, 8, 4)))
  for length, frames in ((3, 7), (7, 7), (4, 6)):
    chunks = [decode(params, z[i : min(i + 3, frames)]) for i in range(0, frames, 3)]
    expected = np.concatenate(chunks)[:length]
    expected = np.floor(255 * np.clip(expected * 0.5 + 0.5, 0, 1))
    ours = pipe.decode(z[:frames], length)
    assert ours.shape == (length, 20, 16, 3)
    assert np.abs(ours - expected).max() <= 1
    assert (ours == expected).mean() > 0.99


def test_frames_come_a_few_at_a_time(pipe):
  """As they are decoded; together they are what `decode` returns."""
  z = np.float32(np.random.default_rng(0).normal(size=(7, 10, 8, 4)))
  for interpolate, counts in ((False, [3, 2]), (True, [5, 4])):
    chunks = [*pipe.frames(z, 5, interpolate=interpolate)]
    assert [len(chunk) for chunk in chunks] == counts
    whole = pipe.decode(z, 5, interpolate=interpolate)
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_interpolates(pipe, folder, video):
  """Between every two frames, those of neighbouring chunks too, one more; every other
  frame is one of those without.
  """
  frames, fps = pipe.generate(
    tiny.portrait(), tiny.speech(), emotion='happy', face_box=tiny.FACE_BOX, seed=3
  )
  assert frames.shape == (19, 20, 16, 3)
  assert frames.dtype == np.uint8
  assert fps == 25
  np.testing.assert_array_equal(frames[::2], video[0])
  graphdef, params = component(folder, 'flownet')
  double = jax.jit(lambda params, x: rife.double(parameters.merge(graphdef, params), x))
  expected = double(params, video[0] / np.float32(255))
  # The expected frames were computed from whole levels.
  assert np.abs(frames - 255 * expected).max() < 3
  latents = np.zeros((4, 10, 8, 4), np.float32)
  assert pipe.decode(latents, 1, interpolate=True).shape == (1, 20, 16, 3)


def test_the_order_of_the_reference_implementation_agrees(pipe):
  """The work that the pipeline saves changes nothing but the last bits.

  The reference implementation guides the face in every frame, samples one window after
  the other, and decodes all padding frames.
  """
  conditions, length = conditions_of(pipe, emotion='happy')
  total = length + pipe.settings.sampler.padding_frames
  assert conditions.spatial.shape == (1, 10, 8, 8)
  assert total == 14
  bucket = (1, 20, 10, 8, 4)  # of 16 frames, and the padding
  noise = np.float32(np.random.default_rng(0).normal(size=bucket))
  ours = np.asarray(pipe.denoise(noise, conditions, [length]))[:, :total]

  unet = pipe.networks['unet']
  make_reference = reference_sampler.make_reference_sampler
  sample = make_reference(unet.graphdef, pipe.settings.sampler)
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
  rounding, not another video.
  """
  pipe = Pipeline.load(folder, parallel.make_mesh(data=-1, fsdp=1), jnp.bfloat16)
  networks = pipe.networks
  assert networks['unet'].params['conv_in.kernel'].dtype == jnp.bfloat16
  assert networks['whisper'].params['encoder.conv1.kernel'].dtype == jnp.float32
  assert networks['flownet'].params['block0.conv0.0.0.kernel'].dtype == jnp.float32
  frames, _ = pipe.generate(
    tiny.portrait(),
    tiny.speech(),
    emotion='happy',
    face_box=tiny.FACE_BOX,
    seed=3,
    progress=lambda *_: None,
  )
  assert count_programs(pipe) == (1, 1)
  assert len(frames) == 19
  squared = np.square(frames[::2].astype(float) - video[0]).mean(axis=(1, 2, 3))
  psnr = 10 * np.log10(255**2 / squared)
  assert psnr.min() > 36  # dB; measured 37.9, and 39.5 over all frames
  conditions, length = conditions_of(pipe, emotion='happy')
  assert pipe.sample(conditions, [length], jax.random.key(3)[None]).dtype == jnp.float32


def test_a_job_takes_the_size_of_the_file_from_the_portrait_or_its_crop(pipe):
  """Rounded down to even numbers; the portrait here is 79x65 pixels."""
  image = np.pad(tiny.portrait(), ((0, 0), (0, 1), (0, 0)))[:79]

  def job(**options):
    return pipe.job(image, tiny.speech(), 'sad', face_box=tiny.FACE_BOX, **options)

  assert job().video_size is None
  assert job(keep_resolution=True).video_size == (64, 78)
  assert job(keep_resolution=True, crop=True).video_size == (64, 64)
  assert job().image_size == 16  # that of the model


def test_the_image_size_of_a_job_is_that_of_its_latents(pipe):
  options = dict(face_box=tiny.FACE_BOX, crop=True, image_size=24)
  job = pipe.job(tiny.portrait(), tiny.speech(), 'sad', **options)
  conditions, _ = pipe.conditions(job)
  assert conditions.reference_latents.shape == (1, 12, 12, 4)
  assert conditions.spatial.shape[1:3] == (12, 12)


def test_refusals(pipe, folder, tmp_path):
  with pytest.raises(WeightsError, match='it has: happy, sad'):
    pipe.generate(tiny.portrait(), tiny.speech(), emotion='bored')
  with pytest.raises(InputError, match='needs an emotion'):
    pipe.generate(tiny.portrait(), tiny.speech())
  with pytest.raises(WeightsError, match='prior has 9 numbers, the model wants 6'):
    pipe.job(tiny.portrait(), tiny.speech(), prior=np.zeros(9))
  with pytest.raises(InputError, match='less than one frame'):
    pipe.job(tiny.portrait(), tiny.speech(0.05), 'sad', face_box=tiny.FACE_BOX)
  with pytest.raises(InputError, match='no face'):
    pipe.job(tiny.portrait(), tiny.speech(), 'sad')
  with pytest.raises(WeightsError, match='not a model folder'):
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

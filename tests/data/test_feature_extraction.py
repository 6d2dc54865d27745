"""Features of clips in memory: what they are made from, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from dicetalk_jax.component import Component
from dicetalk_jax.data import feature_extraction
from dicetalk_jax.data.clip_record import decode_audio, encode_jpeg
from dicetalk_jax.data.feature_extraction import FeatureExtractor
from dicetalk_jax.errors import DataError
from dicetalk_jax.media import audio
from tests import tiny


class Clips:
  """Two clips without pixels: 31 s of audio, and silence."""

  split = 'train'
  fingerprint = 'x'
  made_by = {}
  expression_dim = 64
  lengths = (775, 5)
  samples = (640 * 775, 0)
  table = SimpleNamespace(
    num_frames=np.array(lengths), clip_id=np.array(['long', 'silent'])
  )

  def __len__(self):
    return 2

  def __getitem__(self, i):
    wave = np.random.default_rng(0).integers(-9999, 9999, self.samples[i])
    return {
      'audio': wave.astype(np.int16),
      'num_frames': self.lengths[i],
      'frames': [],
      'expression': np.ones((self.lengths[i], 64)),
    }


class ClipsWithoutExpressions(Clips):
  """The records have room for as many coefficients as MediaPipe gives."""

  expression_dim = 0

  def __getitem__(self, i):
    return super().__getitem__(i) | {'expression': np.zeros((0, 51), np.float32)}


class WideClips(Clips):
  expression_dim = 51


class ClipsWithFaces(Clips):
  """The second clip has pixels, the first has none."""

  def __getitem__(self, i):
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    return super().__getitem__(i) | {
      'frames': [encode_jpeg(pixels)] * 5 * i,
      'bbox': np.tile([0.25, 0.25, 0.75, 0.75], (self.lengths[i], 1)),
    }


class ClipsWithFeatures(Clips):
  """The records carry latents and Whisper states."""

  def __getitem__(self, i):
    frames = self.lengths[i]
    return super().__getitem__(i) | {
      'latents': np.ones((frames, 2, 2, 4)),
      'whisper': np.ones((2 * frames, 2, 8), np.float16),
    }


@pytest.fixture(scope='module')
def networks():
  return {
    name: tiny.component(name, config) for name, config in tiny.FEATURE_CONFIGS.items()
  }


def apply(network, *inputs):
  return network(*inputs)


def test_batches_run_over_the_borders_of_clips():
  batches = []

  def double(rows):
    batches.append(rows.copy())
    return rows * 2

  def computed(items):
    return dict(feature_extraction._batched(double, 4, iter(items)))

  lengths = [3, 0, 9, 1, 4]
  items = [(clip, np.full((rows, 2), clip + 1)) for clip, rows in enumerate(lengths)]
  results = computed(items)
  assert list(results) == [0, 1, 2, 3, 4]
  for clip, rows in items:
    np.testing.assert_array_equal(results[clip], 2 * rows)
  # 17 rows: the fifth batch holds one of them, and is padded with zeros.
  assert [len(rows) for rows in batches] == [4] * 5
  assert not batches[-1][1:].any()
  assert computed([(7, np.zeros((0, 2)))])[7].shape == (0, 2)


def test_long_audio_is_read_in_windows_and_silence_has_no_rows(networks, tmp_path):
  extractor = FeatureExtractor(networks, Clips(), tmp_path, batch=2)
  features = extractor.load_or_compute('whisper', 'prior')
  assert list(features['whisper'].lengths) == [1550, 0]
  mel = audio.log_mel(decode_audio(Clips()[0]))
  windows = np.asarray(networks['whisper'].stage(apply)(mel))
  states = windows.reshape(3000, 2, 8)[:1550]
  np.testing.assert_allclose(features['whisper'](0), states, atol=4e-3)
  assert np.isfinite(features['prior'](1)).all()


def test_priors_of_clips_without_expressions_are_those_of_their_audio(
  networks, tmp_path
):
  extractor = FeatureExtractor(networks, ClipsWithoutExpressions(), tmp_path, batch=2)
  features = extractor.load_or_compute('whisper', 'prior')
  no_expressions = np.zeros((0, 64), np.float32)
  states = features['whisper'](0)
  expected = feature_extraction.gaussian(networks['embedder'], no_expressions, states)
  np.testing.assert_allclose(features['prior'](0)[0], expected, atol=1e-5)


def test_expressions_of_another_width_are_refused_before_anything_is_computed(
  networks, tmp_path
):
  extractor = FeatureExtractor(networks, WideClips(), tmp_path)
  for refuse in (extractor.check, extractor.compute_missing):
    with pytest.raises(
      DataError,
      match='have 51 expression coefficients per frame, but the embedder reads 64; ',
    ):
      refuse('prior')
  assert not list(tmp_path.rglob('*.npy'))


def test_a_clip_without_pixels_has_no_crops(tmp_path):
  extractor = FeatureExtractor({}, ClipsWithFaces(), tmp_path)
  crops = extractor.load_or_compute('crops_8')['crops_8']
  assert list(crops.lengths) == [0, 5]


def test_crops_of_clips_that_all_lack_pixels_are_refused(tmp_path):
  extractor = FeatureExtractor({}, Clips(), tmp_path)
  with pytest.raises(
    DataError, match='no pixels, which crops_16 is made from.*content=full'
  ):
    extractor.load_or_compute('crops_16')


def test_features_in_the_records_are_not_computed(networks, tmp_path):
  extractor = FeatureExtractor(networks, ClipsWithFeatures(), tmp_path, batch=2)
  assert extractor.compute_missing('latents')
  assert extractor.load_or_compute('latents', 'whisper') == {}
  prior = extractor.load_or_compute('latents', 'whisper', 'prior')['prior']
  frames = 5
  present = np.ones(1, bool)
  mu, _ = networks['embedder'].stage(apply)(
    np.ones((1, frames, 64)),
    np.ones((1, 2 * frames, 2, 8)),
    np.ones((1, frames), bool),
    present,
    present,
  )
  np.testing.assert_allclose(prior(1)[0, 0], mu[0], atol=1e-5)
  with pytest.raises(DataError, match='no pixels, which clip_embed is made from'):
    extractor.compute_missing('clip_embed')


def test_values_that_are_not_finite_are_refused(networks, tmp_path):
  whisper = networks['whisper']
  params = {name: value + np.float32(1e6) for name, value in whisper.params.items()}
  broken = Component(whisper.config, whisper.graphdef, params)
  extractor = FeatureExtractor({'whisper': broken}, Clips(), tmp_path, batch=2)
  with pytest.raises(
    DataError,
    match='whisper of clip long is not finite in float16; check the clip and the '
    'weights',
  ):
    extractor.compute_missing('whisper')

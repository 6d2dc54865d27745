"""The clip record: labels, spec, encoding."""

import numpy as np
import pytest

from dicetalk_jax.data import clip_record
from dicetalk_jax.errors import ConfigError, DataError


def test_the_map_to_22_classes_is_a_bijection():
  classes = {
    clip_record.emotion_class(emotion, level)
    for emotion in clip_record.EMOTIONS
    for level in clip_record.LEVELS
  }
  assert classes == set(range(22))
  assert clip_record.emotion_class('neutral', 3) == 0
  assert clip_record.emotion_class('angry', 1) == 1
  assert clip_record.emotion_class('surprised', 3) == 21
  for unlabelled in (('unknown', 0), ('unknown', 2)):
    assert clip_record.emotion_class(*unlabelled) == -1


def test_a_label_without_a_level_leaves_all_levels_possible():
  for emotion in clip_record.EMOTIONS:
    label = clip_record.emotion_class(emotion, 0)
    levels = {clip_record.emotion_class(emotion, level) for level in clip_record.LEVELS}
    assert set(np.flatnonzero(clip_record.CLASSES_OF_LABEL[label])) == levels


def test_unknown_labels_are_refused():
  with pytest.raises(ConfigError, match='bored'):
    clip_record.emotion_class('bored', 1)
  with pytest.raises(ConfigError, match='level 4'):
    clip_record.emotion_class('sad', 4)
  with pytest.raises(ConfigError, match='everything'):
    clip_record.RecordSpec('everything')


def test_contents_differ_in_pixels_and_latents_only():
  names = {
    content: set(clip_record.RecordSpec(content).features())
    for content in clip_record.CONTENTS
  }
  assert names['full'] - names['latents'] == {'frames'}
  assert names['latents'] - names['embedder'] == {'latents', 'clip_embed'}


def _example(spec, **changes):
  rng = np.random.default_rng(0)
  fields = {
    'clip_id': 'a',
    'identity': 'synthetic/1',
    'dataset': 'synthetic',
    'num_frames': 3,
    'emotion': 'happy',
    'intensity': 2,
    'text': 'We wave.',
    'audio': rng.uniform(-1, 1, 1920).astype(np.float32),
    'expression': rng.normal(size=(3, 64)).astype(np.float32),
    'opening': np.linspace(0, 1, 3),
    'bbox': np.array([[0.2, 0.2, 0.7, 0.8]] * 3, np.float32),
    'frames': np.tile(
      np.linspace(0, 255, 16, dtype=np.uint8)[None, :, None, None], (3, 1, 16, 3)
    ),
  }
  return clip_record.encode_example(spec, **fields | changes)


@pytest.mark.parametrize('content', clip_record.CONTENTS)
def test_round_trip_through_the_serialised_form(content):
  spec = clip_record.RecordSpec(content)
  features = spec.features()
  example = _example(spec)
  back = features.deserialize_example_np(features.serialize_example(example))
  assert set(back) == set(example)
  assert clip_record.decode_text(back, 'video_id') == 'a'  # the clip itself by default
  assert clip_record.decode_text(back, 'text') == 'We wave.'
  assert clip_record.decode_emotion(back) == 'happy'
  assert back['intensity'] == 2 and back['num_frames'] == 3 and back['fps'] == 25
  assert clip_record.DATASETS[back['dataset']] == 'synthetic'
  for name, (shape, dtype) in spec.blocks.items():
    assert back[name].dtype == dtype and back[name].ndim == len(shape)
    np.testing.assert_array_equal(back[name], example[name])
  assert len(back['whisper']) == len(back['phoneme']) == 0
  assert back['has_audio'] and back['has_video'] and back['has_expression']
  assert not back['has_prior']
  wave = np.random.default_rng(0).uniform(-1, 1, 1920)
  assert np.abs(clip_record.decode_audio(back) - wave).max() < 1e-4
  if content == 'full':
    frames = clip_record.decode_frames(back, [2, 0])
    assert frames.shape == (2, 16, 16, 3) and frames.dtype == np.uint8
    gradient = np.linspace(0, 255, 16).astype(int)[:, None, None]
    assert np.abs(frames[0].astype(int) - gradient).max() < 8


def test_rows_that_do_not_fit_are_refused():
  spec = clip_record.RecordSpec()
  with pytest.raises(DataError, match='clip a: expression has shape'):
    _example(spec, expression=np.zeros((4, 64)))
  with pytest.raises(DataError, match='audio'):
    _example(spec, audio=np.zeros(1919))
  with pytest.raises(DataError, match='2 images for 3 frames'):
    _example(spec, frames=np.zeros((2, 16, 16, 3), np.uint8))
  with pytest.raises(DataError, match='no block expr'):
    _example(spec, expr=np.zeros((3, 64)))


def test_motion_is_what_moves():
  box = np.array([[0.3, 0.3, 0.5, 0.5]])
  moving = box + np.array([[0.0], [0.1], [0.2]])
  assert clip_record.head_motion(np.repeat(box, 3, axis=0)) < 1e-12
  motion = clip_record.head_motion(moving)
  np.testing.assert_allclose(motion, np.sqrt(2 * 0.02 / 3) / 0.2)
  nearer_the_camera = clip_record.head_motion(2 * moving)
  assert nearer_the_camera == pytest.approx(motion)
  assert clip_record.expression_motion(np.array([[0.0, 1], [2, 1]])) == 0.5

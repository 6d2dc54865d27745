"""The judges of rendered faces, on people whom they have not seen."""

import json
import os

import numpy as np
import pytest
import safetensors.numpy

from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.metrics import face_features, judges
from dicetalk_jax.metrics.clip_scores import summarise
from dicetalk_jax.metrics.judges import Judges
from examples.judges import held_out, rendered_faces, sanity_rows, sanity_table, train

PEOPLE = 4
SHOWN = ('angry', 'contempt', 'happy', 'surprised')


@pytest.fixture(scope='module')
def shipped():
  return Judges.load()


@pytest.fixture(scope='module')
def true_clips(shipped):
  return sanity_rows.true_samples(shipped, PEOPLE, SHOWN)


@pytest.fixture(scope='module')
def sample(true_clips):
  return true_clips[0][0]


@pytest.mark.parametrize('row', sanity_rows.ROWS)
def test_a_spoilt_clip_breaks_what_it_should_and_nothing_else(row, shipped, true_clips):
  truth, gallery = true_clips
  spoilt = sanity_rows.ROWS[row](truth, shipped)
  values, _ = sanity_table.measure(spoilt, truth, gallery)
  print(values)
  assert sanity_table.outside(row, values) == []


def test_every_row_has_limits_and_breaks_some_score():
  assert set(sanity_table.BROKEN) == set(sanity_rows.ROWS)
  whole = {'truth', 'another take'}
  assert {row for row, broken in sanity_table.BROKEN.items() if not broken} == whole


def test_a_still_image_does_not_win_identity(shipped, true_clips):
  truth, gallery = true_clips
  still = sanity_rows.still_image(truth, shipped)
  values, scores = sanity_table.measure(still, truth, gallery)
  assert values['emotion'] == values['nearest'] == 1  # as good as true clips
  assert summarise(scores)['identity'].clips == 0


def test_a_reading_has_the_promised_form(shipped, sample):
  reading, n = sample.reading, len(sample.frames)
  assert reading.emotion.shape == (n, len(EMOTIONS))
  np.testing.assert_allclose(np.exp(reading.emotion).sum(1), 1, rtol=1e-5)
  for values in (reading.strength, reading.opening, reading.jaw, reading.width):
    assert values.shape == (n,)
  assert reading.strength.min() >= 0 and reading.strength.max() <= 1
  assert reading.identity.shape == (n, judges.IDENTITY)
  np.testing.assert_allclose(np.linalg.norm(reading.identity, axis=1), 1, rtol=1e-5)
  assert np.linalg.norm(reading.embedding) == pytest.approx(1, rel=1e-5)
  assert reading.features.shape == (n, 256)
  assert reading.part(slice(3)).recognised == sample.case.emotion


def test_frames_are_read_each_on_its_own(shipped, sample):
  alone = shipped.read(sample.frames[4:5], sample.box)
  for name, values in vars(alone).items():
    together = getattr(sample.reading, name)[4:5]
    np.testing.assert_allclose(values, together, atol=1e-4, err_msg=name)


def test_one_box_serves_the_clip(shipped, sample):
  boxes = sample.box + np.linspace(-0.02, 0.02, len(sample.frames))[:, None]
  np.testing.assert_allclose(
    shipped.read(sample.frames, boxes).opening, sample.reading.opening, atol=1e-4
  )


def test_identity_sees_the_inner_face_only(sample):
  crops = face_features.crop_faces(sample.frames[:2], sample.box)
  hidden = crops.copy()
  down, right = np.mgrid[:64, :64]
  inner = ((down - 37.5) / 23) ** 2 + ((right - 31.5) / 22) ** 2 < 1
  hidden[:, ~inner] = (0, 255, 0)
  np.testing.assert_array_equal(
    face_features.identity_features(hidden), face_features.identity_features(crops)
  )


def test_crops_cut_out_the_box():
  frames = np.zeros((2, 100, 200, 3), np.uint8)
  frames[:, 20:60, 100:150] = 200
  crops = face_features.crop_faces(frames, np.float32([[0.5, 0.2, 0.75, 0.6]] * 2))
  assert crops.shape == (2, 64, 64, 3)
  assert crops[:, 3:-3, 3:-3].min() > 190
  assert crops.min() > 140


def test_the_shipped_file_is_small_and_says_how_it_was_made(shipped):
  assert os.path.getsize(judges.WEIGHTS) <= 3_000_000
  assert set(shipped.metadata) == {'fingerprint', 'settings', 'held_out'}
  assert shipped.metadata['fingerprint'] == shipped.fingerprint
  held_out = json.loads(shipped.metadata['held_out'])
  assert held_out['emotion_strong'] >= 0.97
  assert held_out['opening_r'] >= 0.96
  assert held_out['nearest'] >= 0.98


def test_damaged_and_missing_weights_are_refused(tmp_path, shipped):
  with pytest.raises(WeightsError, match='no judges at .*judges.train'):
    Judges.load(tmp_path / 'missing.safetensors')
  (tmp_path / 'cut.safetensors').write_bytes(judges.WEIGHTS.read_bytes()[:10_000])
  with pytest.raises(WeightsError, match='cannot read'):
    Judges.load(tmp_path / 'cut.safetensors')
  arrays = safetensors.numpy.load_file(judges.WEIGHTS)
  arrays['identity.last.bias'] = arrays['identity.last.bias'] + 1
  other = tmp_path / 'other.safetensors'
  safetensors.numpy.save_file(arrays, other, shipped.metadata)
  with pytest.raises(WeightsError, match='other arrays'):
    Judges.load(other)


def test_training_learns_and_repeats_itself(capsys):
  few = rendered_faces.learned(2, workers=1)
  assert len(few.clip) == 2 * 24 * 7 * 4  # people, clips, frames, copies

  def trained():
    params = {}
    for name, loss in train.LOSSES.items():
      params |= train.train(name, few, loss, epochs=3, seed=0)
    return {name: np.asarray(x, np.float16) for name, x in params.items()}

  params = trained()
  assert judges.fingerprint(params) == judges.fingerprint(trained())
  scores = held_out.held_out(Judges(params), few)
  assert scores['emotion_strong'] > 0.7  # people whom it knows; chance is .125
  assert scores['opening_r'] > 0.8
  assert scores['nearest'] == 1

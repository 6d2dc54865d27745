import numpy as np
import pytest
from scipy import ndimage

from data_pipelines.synthetic.clip import make_clip
from dicetalk_jax.data.clip_record import EMOTIONS, FPS
from dicetalk_jax.metrics import face_probe
from dicetalk_jax.metrics.emotion_accuracy import emotion_accuracy
from dicetalk_jax.metrics.lip_sync import lip_sync

NEUTRAL = EMOTIONS.index('neutral')


def _clips(identities, seconds):
  """Per clip: crops [N,64,64,3], emotion, openings [N], and a neutral crop of the
  same person for every frame.
  """
  clips = []
  for identity in identities:
    own = [
      make_clip(identity, emotion, 3, 8 * identity + i, max_seconds=seconds)
      for i, emotion in enumerate(EMOTIONS)
    ]
    crops = [face_probe.crop_faces(clip.frames, clip.bbox) for clip in own]
    clips += [
      (crop, i, clip.opening, np.broadcast_to(crops[NEUTRAL][1], crop.shape))
      for i, (crop, clip) in enumerate(zip(crops, own))
    ]
  return clips


@pytest.fixture(scope='module')
def known():
  crops, emotions, openings, references = zip(*_clips(range(14), 0.44))
  frames = (
    np.concatenate(crops)[::2],
    np.repeat(emotions, [len(c) for c in crops])[::2],
    np.concatenate(openings)[::2],
  )
  return *frames, np.concatenate(references)[::2]


@pytest.fixture(scope='module')
def unseen():
  return _clips(range(500, 503), 0.6)


@pytest.fixture(scope='module')
def probe(known):
  return face_probe.FaceProbe.fit(*known[:3])


def _votes(clips, emotion):
  return emotion_accuracy(
    [emotion(clip) for clip in clips], [clip[1] for clip in clips]
  )['emo_acc']


def test_emotions_of_unseen_persons(probe, unseen):
  assert _votes(unseen, lambda clip: probe.emotion(clip[0])) > 0.8  # chance: .125
  np.testing.assert_allclose(np.exp(probe.emotion(unseen[0][0])).sum(1), 1, rtol=1e-6)


def test_emotions_seen_through_blur_and_mirror(probe, unseen):
  def blurred(crops):
    return np.stack([ndimage.gaussian_filter(crop, (1, 1, 0)) for crop in crops])

  assert _votes(unseen, lambda clip: probe.emotion(blurred(clip[0]))) > 0.7
  assert _votes(unseen, lambda clip: probe.emotion(clip[0][:, :, ::-1])) > 0.7


def test_openings_of_unseen_persons(probe, unseen):
  seen, true = (
    np.concatenate(parts)
    for parts in zip(*[(probe.opening(clip[0]), clip[2]) for clip in unseen])
  )
  assert np.corrcoef(seen, true)[0, 1] > 0.6
  assert np.abs(seen - true).mean() < np.abs(true - true.mean()).mean()


def test_a_neutral_picture_of_the_person_helps(known, unseen):
  probe = face_probe.FaceProbe.fit(*known)
  assert _votes(unseen, lambda clip: probe.emotion(clip[0], clip[3][:1])) > 0.8
  one, every = (
    probe.opening(unseen[0][0], reference)
    for reference in (unseen[0][3][:1], unseen[0][3])
  )
  np.testing.assert_allclose(one, every, atol=1e-5)


def test_lips_of_an_unseen_person_are_in_sync(probe):
  clip = make_clip(600, 'happy', 2, 600)
  seen = probe.opening(face_probe.crop_faces(clip.frames, clip.bbox))
  score = lip_sync(seen, clip.opening, FPS)
  late = lip_sync(
    seen[:-3], clip.opening[3:], FPS
  )  # every truth comes three frames too early
  assert score.correlation > 0.6
  assert (score.offset, late.offset) == (0, 3)


def test_a_still_portrait_does_not_speak(probe):
  clip = make_clip(601, 'neutral', 1, 601, max_seconds=1.0)
  still = np.broadcast_to(clip.frames[:1], clip.frames.shape)
  seen = probe.opening(
    face_probe.crop_faces(still, clip.bbox)
  )  # although the true boxes follow the true jaw
  assert np.ptp(seen) < 1e-9


def test_crops_cut_out_the_box():
  frames = np.zeros((2, 100, 200, 3), np.uint8)
  frames[:, 20:60, 100:150] = 200
  crops = face_probe.crop_faces(frames, np.float32([[0.5, 0.2, 0.75, 0.6]] * 2))
  assert crops.shape == (2, 64, 64, 3)
  assert crops[:, 3:-3, 3:-3].min() > 190
  assert crops.min() > 140


def test_frames_beyond_the_limit_are_thinned_out(known):
  crops, emotions, openings, _ = (part[:257] for part in known)
  thinned = face_probe.FaceProbe.fit(crops, emotions, openings, max_frames=129)
  few = face_probe.FaceProbe.fit(crops[::2], emotions[::2], openings[::2])
  np.testing.assert_array_equal(few.weights, thinned.weights)

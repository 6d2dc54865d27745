"""The probe of rendered faces: identities that it has not seen, blur, still faces."""

from typing import NamedTuple

import numpy as np
import pytest
from scipy import ndimage

from data_pipelines.synthetic.clip import make_clip
from dicetalk_jax.data.clip_record import EMOTIONS, FPS
from dicetalk_jax.metrics import face_probe
from dicetalk_jax.metrics.emotion_accuracy import emotion_accuracy
from dicetalk_jax.metrics.lip_sync import lip_sync

NEUTRAL = EMOTIONS.index('neutral')


class Clip(NamedTuple):
  """A clip, or frames of several with the emotion of each."""

  crops: np.ndarray  # [N,64,64,3]
  emotion: int | np.ndarray
  openings: np.ndarray  # [N]
  reference: np.ndarray  # [N,64,64,3], a neutral crop of the same identity


def _clips(identities, seconds):
  clips = []
  for identity in identities:
    own = [
      make_clip(identity, emotion, 3, 8 * identity + i, max_seconds=seconds)
      for i, emotion in enumerate(EMOTIONS)
    ]
    crops = [face_probe.crop_faces(clip.frames, clip.bbox) for clip in own]
    for i, (crop, clip) in enumerate(zip(crops, own)):
      reference = np.broadcast_to(crops[NEUTRAL][1], crop.shape)
      clips.append(Clip(crop, i, clip.opening, reference))
  return clips


@pytest.fixture(scope='module')
def known():
  crops, emotions, openings, references = zip(*_clips(range(14), 0.44))
  return Clip(
    np.concatenate(crops)[::2],
    np.repeat(emotions, [len(clip) for clip in crops])[::2],
    np.concatenate(openings)[::2],
    np.concatenate(references)[::2],
  )


@pytest.fixture(scope='module')
def unseen():
  return _clips(range(500, 503), 0.6)


@pytest.fixture(scope='module')
def probe(known):
  return face_probe.FaceProbe.fit(*known[:3])


def _accuracy(clips, log_probs):
  """The share of clips, each with the result of `log_probs`, that vote rightly."""
  emotions = [clip.emotion for clip in clips]
  return emotion_accuracy([log_probs(clip) for clip in clips], emotions)['emo_acc']


def test_emotions_of_unseen_identities(probe, unseen):
  assert _accuracy(unseen, lambda clip: probe.emotion(clip.crops)) > 0.8  # chance: .125
  probabilities = np.exp(probe.emotion(unseen[0].crops))
  np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)


def test_emotions_seen_through_blur_and_mirror(probe, unseen):
  def blurred(clip):
    crops = [ndimage.gaussian_filter(crop, (1, 1, 0)) for crop in clip.crops]
    return probe.emotion(np.stack(crops))

  def mirrored(clip):
    return probe.emotion(clip.crops[:, :, ::-1])

  assert _accuracy(unseen, blurred) > 0.7
  assert _accuracy(unseen, mirrored) > 0.7


def test_openings_of_unseen_identities(probe, unseen):
  seen = np.concatenate([probe.opening(clip.crops) for clip in unseen])
  true = np.concatenate([clip.openings for clip in unseen])
  assert np.corrcoef(seen, true)[0, 1] > 0.6
  assert np.abs(seen - true).mean() < np.abs(true - true.mean()).mean()


def test_a_neutral_image_of_the_identity_helps(known, unseen):
  probe = face_probe.FaceProbe.fit(*known)

  def with_reference(clip):
    return probe.emotion(clip.crops, clip.reference[:1])

  assert _accuracy(unseen, with_reference) > 0.8
  clip = unseen[0]
  one = probe.opening(clip.crops, clip.reference[:1])
  every = probe.opening(clip.crops, clip.reference)
  np.testing.assert_allclose(one, every, atol=1e-5)


def test_lips_of_an_unseen_identity_are_in_sync(probe):
  clip = make_clip(600, 'happy', 2, 600)
  seen = probe.opening(face_probe.crop_faces(clip.frames, clip.bbox))
  score = lip_sync(seen, clip.opening, FPS)
  # Each truth comes three frames too early.
  late = lip_sync(seen[:-3], clip.opening[3:], FPS)
  assert score.correlation > 0.6
  assert (score.offset, late.offset) == (0, 3)


def test_a_still_portrait_does_not_speak(probe):
  clip = make_clip(601, 'neutral', 1, 601, max_seconds=1.0)
  still = np.broadcast_to(clip.frames[:1], clip.frames.shape)
  # The true boxes follow the true jaw all the same.
  seen = probe.opening(face_probe.crop_faces(still, clip.bbox))
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

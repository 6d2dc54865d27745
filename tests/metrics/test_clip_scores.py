"""Scores of clips on made readings: what counts, intervals, seams and drift."""

import numpy as np
import pytest

from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.errors import InputError
from dicetalk_jax.metrics import clip_scores
from dicetalk_jax.metrics.face_distance import FaceSpace
from dicetalk_jax.metrics.judges import Reading

FPS = 12.5
GALLERY = np.eye(4, 64, dtype=np.float32)


def _mouth(seed, frames=30):
  noise = np.random.default_rng(seed).standard_normal(frames + 4)
  return 0.1 + 0.05 * np.convolve(noise, np.hanning(5), 'valid')


def _reading(emotion='happy', person=0, opening=None, frames=30):
  opening = _mouth(0, frames) if opening is None else opening
  log_probs = np.full((frames, len(EMOTIONS)), np.log(0.05))
  log_probs[:, EMOTIONS.index(emotion)] = np.log(0.65)
  return Reading(
    emotion=log_probs,
    strength=np.full(frames, 0.8),
    opening=opening,
    jaw=opening,
    width=opening,
    identity=np.repeat(GALLERY[person : person + 1], frames, axis=0),
    features=np.zeros((frames, 256)),
  )


def _score(reading, person=0, **options):
  settings = {'asked': 'happy', 'opening': _mouth(0), 'fps': FPS, 'gallery': GALLERY}
  return clip_scores.score_clip(reading, person=person, **settings | options)


def test_a_clip_that_is_right_in_everything():
  score = _score(_reading())
  assert score.emotion_right and score.in_sync and score.identity_right
  assert score.identity_counts
  assert score.recognised == 'happy'
  assert score.sync.correlation == pytest.approx(1)
  assert (score.identity_similarity, score.strength) == pytest.approx((1, 0.8))


@pytest.mark.parametrize(
  'spoilt',
  [
    _reading(opening=np.full(30, 0.1)),  # still
    _reading(opening=_mouth(1)),  # another sentence
    _reading(opening=np.roll(_mouth(0), 2)),  # late
    _reading('sad'),
  ],
)
def test_identity_does_not_count_without_sync_and_emotion(spoilt):
  score = _score(spoilt)
  assert score.identity_right and not score.identity_counts
  summary = clip_scores.summarise([score])
  assert summary['identity'].clips == 0 and np.isnan(summary['identity'].mean)
  assert summary['passed'].mean == summary['all_right'].mean == 0


def test_closed_lips_are_counted_in_the_frames_that_ask_for_them():
  opening = np.full(30, 0.2)
  opening[[3, 9]] = 0.01
  closed = np.isin(np.arange(30), [3, 9, 20, 25])
  assert _score(_reading(opening=opening), closed=closed).closure == 0.5
  assert np.isnan(_score(_reading(opening=opening)).closure)


def test_levels_are_apart():
  right, wrong = _reading(), _reading('sad')
  scores = [_score(right, level=3), _score(right, level=2), _score(wrong, level=1)]
  summary = clip_scores.summarise(scores)
  assert (summary['emotion'].mean, summary['emotion'].clips) == (1, 2)
  assert (summary['emotion_subtle'].mean, summary['emotion_subtle'].clips) == (0, 1)
  neutral = _score(_reading('neutral'), asked='neutral', level=1)
  assert clip_scores.summarise([neutral])['emotion'].clips == 1


def test_intervals_are_over_people():
  # Two people right in everything, two wrong in everything, 25 clips each.
  scores = [
    _score(_reading('happy' if person < 2 else 'sad', person), person)
    for person in range(4)
    for _ in range(25)
  ]
  summary = clip_scores.summarise(scores)
  emotion = summary['emotion']
  assert emotion.mean == 0.5
  # Of clips the interval would be .4 to .6.
  assert emotion.low <= 0.25 and emotion.high >= 0.75
  assert summary['sync'].low == pytest.approx(summary['sync'].high)
  again = clip_scores.summarise(scores)
  np.testing.assert_array_equal(list(again.values()), list(summary.values()))


def test_no_clips_are_refused():
  with pytest.raises(InputError, match='score some first'):
    clip_scores.summarise([])


def test_a_seam_shows_where_windows_meet():
  step = np.random.default_rng(0).uniform(0.5, 1.5, (24, 1, 1, 1))
  smooth = np.cumsum(np.ones((24, 4, 4, 3)) * step, axis=0)
  broken = smooth + 5 * (np.arange(24) // 8)[:, None, None, None]
  assert clip_scores.seam(smooth, 8) == pytest.approx(1, abs=0.5)
  assert clip_scores.seam(broken, 8) > 4
  with pytest.raises(InputError, match='longer clip'):
    clip_scores.seam(smooth, 24)


def test_drift_is_a_change_of_the_person():
  steady, changed = _reading(frames=50), _reading(frames=50)
  changed.identity[25:] = GALLERY[1]
  assert clip_scores.drift(steady) == pytest.approx(0)
  assert clip_scores.drift(changed) == pytest.approx(1)
  with pytest.raises(InputError, match='two seconds'):
    clip_scores.drift(_reading(frames=20))


def test_face_distance_is_in_variances_and_has_a_floor():
  rng = np.random.default_rng(0)
  truth = rng.standard_normal((600, 20)) * np.linspace(3, 0.1, 20)
  space = FaceSpace.fit(truth, components=8)
  clips = np.repeat(np.arange(60), 10)
  floor = space.floor(truth, clips)
  assert space.distance(truth, truth).distance == pytest.approx(0, abs=1e-9)
  assert 0 < floor.distance < 0.1 and floor.frames == 300
  # Twice as wide in every direction: sum of (2 s - s)^2 over the sum of s^2.
  assert space.distance(truth, 2 * truth - truth.mean(0)).distance == pytest.approx(1)
  with pytest.raises(InputError, match='too few for 8 components'):
    FaceSpace.fit(truth[:8], components=8)

"""Whole clips: the promised arrays, reproducible everywhere, emotion and identity
entangled in the expression.
"""

import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.synthetic import emotions, motion, phonemes, speech, visemes
from data_pipelines.synthetic.clip import Clip, activations, make_clip, make_portrait
from data_pipelines.synthetic.identity import make_identity
from dicetalk_jax.data.clip_record import EMOTIONS, FPS, SAMPLES_PER_FRAME
from dicetalk_jax.errors import InputError

_ROOT = pathlib.Path(__file__).parents[2]


def test_arrays_have_the_promised_shapes_types_and_ranges():
  clip = make_clip(3, 'happy', 2, 5, size=32, max_seconds=0.5)
  n = 12
  expected = dict(
    frames=(np.uint8, (n, 32, 32, 3)),
    audio=(np.float32, (n * SAMPLES_PER_FRAME,)),
    expression=(np.float32, (n, 64)),
    bbox=(np.float32, (n, 4)),
    landmarks=(np.float32, (n, 68, 2)),
    au=(np.float32, (n, 26)),
    opening=(np.float32, (n,)),
    viseme=(np.float32, (n, 6)),
    phoneme=(np.int32, (n,)),
    pose=(np.float32, (n, 5)),
    blink=(np.float32, (n,)),
  )
  assert {
    k: (getattr(clip, k).dtype, getattr(clip, k).shape) for k in expected
  } == expected
  assert {f.name for f in dataclasses.fields(Clip)} == {*expected, 'text'}
  assert (
    clip.au.min() >= 0
    and clip.au.max() <= 1.25
    and clip.blink.min() >= 0
    and clip.blink.max() <= 1
  )
  assert (clip.bbox[:, :2] < clip.bbox[:, 2:]).all()
  assert clip.text == phonemes.text(phonemes.sentence(5))


def test_every_second_frame_is_what_the_whole_clip_has_there():
  settings = {'size': 24, 'max_seconds': 0.44}
  whole = make_clip(4, 'sad', 2, 6, **settings)
  half = make_clip(4, 'sad', 2, 6, every=2, **settings)
  for field in dataclasses.fields(Clip):
    expected = getattr(whole, field.name)
    if field.name not in ('audio', 'text'):
      expected = expected[::2]
    np.testing.assert_array_equal(getattr(half, field.name), expected, field.name)


def test_lips_touch_in_bilabials():
  clip = make_clip(4, 'sad', 2, 6, render=False)
  assert clip.lips_touch.any()
  assert np.median(clip.opening[clip.lips_touch]) < 0.01
  assert np.median(clip.opening[~clip.lips_touch]) > 0.02


def test_without_rendering_the_truth_is_the_same():
  drawn, plain = (
    make_clip(1, 'sad', 3, 2, size=16, max_seconds=0.6, render=render)
    for render in (True, False)
  )
  assert plain.frames.shape == (0, 16, 16, 3) and len(drawn.frames) == len(drawn.au)
  assert digest(drawn) == digest(plain)


def test_cutting_keeps_the_beginning():
  whole, cut = (
    make_clip(1, 'fear', 1, 4, render=False),
    make_clip(1, 'fear', 1, 4, render=False, max_seconds=0.8),
  )
  assert len(cut.au) == 20 and len(cut.audio) == 20 * SAMPLES_PER_FRAME
  np.testing.assert_array_equal(cut.expression, whole.expression[:20])
  np.testing.assert_array_equal(cut.audio, whole.audio[: len(cut.audio)])
  np.testing.assert_array_equal(cut.landmarks, whole.landmarks[:20])


def digest(clip: Clip) -> str:
  truth = [
    getattr(clip, f.name)
    for f in dataclasses.fields(clip)
    if f.name not in ('frames', 'text')
  ]
  return hashlib.sha256(b''.join(array.tobytes() for array in truth)).hexdigest()


def test_same_arguments_give_the_same_clip():
  def make(**kw):
    return make_clip(7, 'angry', 3, 11, size=24, max_seconds=0.4, **kw)

  first, second = make(), make()
  assert digest(first) == digest(second) and first.text == second.text
  np.testing.assert_array_equal(first.frames, second.frames)
  other = make(take=1)
  assert other.text == first.text and digest(other) != digest(first)
  assert not np.array_equal(other.frames, first.frames)


_HASHES = """
import hashlib
from data_pipelines.synthetic.clip import make_clip
clip = make_clip(9, 'surprised', 2, 3, size=16, max_seconds=.4)
arrays = (clip.frames, clip.audio, clip.expression, clip.landmarks, clip.opening)
hashes = [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
"""


def test_another_process_makes_the_same_clip():
  here: dict = {}
  exec(_HASHES, here)
  run = subprocess.run(
    [sys.executable, '-c', _HASHES + 'print(*hashes)'],
    capture_output=True,
    text=True,
    check=True,
    cwd=_ROOT,
    env={**os.environ, 'PYTHONHASHSEED': '123', 'PYTHONPATH': str(_ROOT)},
  )
  assert run.stdout.split() == here['hashes']


def test_motion_scales_the_head_and_nothing_else():
  still, lively = (
    make_clip(2, 'neutral', 1, 6, render=False, motion=m) for m in (0.0, 2.0)
  )
  assert still.pose.std(0).max() == 0 and lively.pose.std(0).min() > 0.002
  np.testing.assert_array_equal(still.audio, lively.audio)
  np.testing.assert_array_equal(still.au, lively.au)


def test_articulation_opens_the_mouth_of_a_speaker():
  quiet, natural, clear = (
    make_clip(3, 'neutral', 1, 5, articulation=a, render=False) for a in (0.0, 1.0, 1.6)
  )
  assert (
    quiet.opening.std() < natural.opening.std() / 3
    and clear.opening.std() > 1.2 * natural.opening.std()
  )
  np.testing.assert_array_equal(natural.audio, clear.audio)


def test_zoom_shows_the_middle_of_the_same_scene():
  far, near = (
    make_clip(3, 'happy', 3, 5, size=s, zoom=z, max_seconds=0.2)
    for s, z in ((96, 1.0), (80, 1.2))
  )
  np.testing.assert_array_equal(near.frames, far.frames[:, 8:88, 8:88])
  np.testing.assert_allclose(near.bbox * 80, far.bbox * 96 - 8, atol=1e-3)
  np.testing.assert_allclose(near.landmarks * 80, far.landmarks * 96 - 8, atol=1e-3)
  portrait, box = make_portrait(3, 80, zoom=1.2)
  whole, whole_box = make_portrait(3, 96)
  np.testing.assert_array_equal(portrait, whole[8:88, 8:88])
  np.testing.assert_allclose(box * 80, whole_box * 96 - 8, atol=1e-3)


def test_neutral_ignores_the_level():
  assert digest(make_clip(2, 'neutral', 1, 6, render=False)) == digest(
    make_clip(2, 'neutral', 3, 6, render=False)
  )


def test_blinks_last_a_fifth_of_a_second_with_gaps():
  closed = np.concatenate(
    [motion.blinks(250, np.random.default_rng(s)) for s in range(20)]
  )
  starts = np.flatnonzero((closed[1:] > 0) & (closed[:-1] == 0))
  assert 20 * 10 / 5 < len(starts) < 20 * 10 / 1.2
  assert 0.03 < (closed > 0).mean() < 0.15 and closed.max() > 0.9


@pytest.mark.parametrize('arguments', [('joyful', 1), ('happy', 0), ('happy', 4)])
def test_unknown_emotions_and_levels_are_named(arguments):
  with pytest.raises(InputError, match=f'{arguments[0]}|level {arguments[1]}'):
    make_clip(0, *arguments, 0, render=False)


def test_a_clip_without_frames_is_refused():
  with pytest.raises(InputError, match='max_seconds'):
    make_clip(0, 'happy', 1, 0, max_seconds=0.01)


def test_portrait_is_frontal_and_still():
  image, box = make_portrait(4, size=96)
  assert image.shape == (96, 96, 3) and image.dtype == np.uint8 and box.shape == (4,)
  assert box[0] + box[2] == pytest.approx(1, abs=1e-5)  # centred
  np.testing.assert_array_equal(image, make_portrait(4, size=96)[0])


def _expressions(identities: int, leakage: float):
  """Talking frames of all emotions and levels: vectors, identity, emotion.

  A few sentences are shared to save time.
  """
  rng, tracks = np.random.default_rng(0), []
  for seed in range(8):
    utterance = speech.synthesise(
      phonemes.sentence(seed), speech.Voice(120.0, 1.0), speech.Prosody(), rng
    )
    tracks.append((visemes.viseme_track(utterance), motion.loudness(utterance.audio)))
  vectors, labels = [], []
  for identity in range(identities):
    for index, emotion in enumerate(EMOTIONS):
      for level in (1, 2, 3) if emotion != 'neutral' else (1,):
        track, loud = tracks[rng.integers(8)]
        strength = emotions.envelope(len(loud), rng)[:, None]
        gain = make_identity(identity).jaw_gain * emotions.speech_jaw(emotion, level)
        au = activations(strength * emotions.preset(emotion, level), track, loud, gain)
        picked = np.linspace(3, len(au) - 4, 10).astype(int)
        vectors.append(emotions.expression(identity, au[picked], rng, leakage))
        labels += [(identity, index)] * len(picked)
  return np.concatenate(vectors), *np.array(labels).T


def _linear_probe(x, y, test):
  """Accuracy on `test` of a least-squares classifier that was fitted on the rest."""
  mean, std = x[~test].mean(0), x[~test].std(0)
  x = np.concatenate([(x - mean) / std, np.ones((len(x), 1))], 1)
  targets = np.eye(y.max() + 1)[y[~test]]
  weights = np.linalg.solve(
    x[~test].T @ x[~test] + np.eye(x.shape[1]), x[~test].T @ targets
  )
  return np.mean((x[test] @ weights).argmax(1) == y[test])


def test_expression_carries_emotion_and_leaks_identity():
  """Solvable but entangled: emotion is linear for new people, and so, to a large
  part, is identity in new emotions.
  """
  x, identity, emotion = _expressions(32, emotions.LEAKAGE)
  assert 0.4 < x.std() < 0.6
  assert _linear_probe(x, emotion, identity >= 24) > 0.93
  leaked = [
    _linear_probe(x, identity, np.isin(emotion, pair))
    for pair in ((0, 1), (2, 3), (4, 6))
  ]
  assert 0.45 < np.mean(leaked) < 0.85  # chance is 1 / 32


def test_leakage_is_a_dial():
  x, identity, emotion = _expressions(32, 0.0)
  assert _linear_probe(x, emotion, identity >= 24) > 0.99
  assert _linear_probe(x, identity, np.isin(emotion, (0, 1))) < 0.08


def test_drift_lasts_a_second_and_changes_nothing_else():
  au = np.zeros((4000, len(emotions.AUS)), np.float32)
  still, drifting = (
    emotions.expression(3, au, np.random.default_rng(0), drift=d) for d in (0.0, 0.2)
  )
  error = (drifting - still).astype(np.float64)
  second = (error[:-FPS] * error[FPS:]).mean() / np.square(error).mean()
  assert second == pytest.approx(np.exp(-1), abs=0.05)
  # 3 * .2 in 26 of 64 directions, on the scale of the vector.
  assert error.std() == pytest.approx(0.72 * 3 * 0.2 * np.sqrt(26 / 64), rel=0.05)
  before, after = (
    make_clip(3, 'happy', 2, 5, render=False, drift=d) for d in (0.0, 0.2)
  )
  assert np.abs(after.expression - before.expression).max() > 0.2
  np.testing.assert_array_equal(after.au, before.au)
  np.testing.assert_array_equal(after.audio, before.audio)

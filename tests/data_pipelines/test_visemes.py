"""Visemes: targets are reached, closures never fall between frames, speech and
emotion share the mouth.
"""

import numpy as np

from data_pipelines.synthetic import phonemes, speech, visemes


def track_of(words):
  utterance = speech.synthesise(
    words, speech.Voice(120.0, 1.0), speech.Prosody(), np.random.default_rng(0)
  )
  return utterance, visemes.viseme_track(utterance)


def test_channels_follow_their_phonemes():
  utterance, track = track_of(('papa', 'moon', 'five', 'cheese', 'think'))
  names = np.array(phonemes.PHONEMES)[track.phoneme]

  def mean(channel, *group):
    return track.viseme[np.isin(names, group), channel].mean()

  assert (
    track.viseme.shape == (utterance.frames, 6) and track.viseme.dtype == np.float32
  )
  assert track.viseme.min() >= 0 and track.viseme.max() <= 1
  assert mean(visemes.JAW, 'AA') > 0.5 > 0.3 > mean(visemes.JAW, 'IY', 'UW', 'SIL')
  assert mean(visemes.ROUND, 'UW') > 0.7 and mean(visemes.WIDE, 'IY') > 0.4
  assert mean(visemes.FV, 'F', 'V') > 0.6 and mean(visemes.FV, 'AA', 'UW', 'IY') < 0.1
  assert mean(visemes.TONGUE, 'TH') > 0.5


def test_every_bilabial_has_a_closed_frame_at_its_middle():
  for seed in range(20):
    utterance, track = track_of(phonemes.sentence(seed))
    closures = visemes.closure_frames(utterance)
    assert len(closures) == sum(
      p in visemes.BILABIALS for _, _, p in utterance.intervals
    )
    assert (track.viseme[closures, visemes.PRESS] == 1).all()


def test_neighbours_colour_each_other():
  _, moon = track_of(('moon',))
  _, mama = track_of(('mama',))

  def first(track):
    return track.viseme[track.phoneme == phonemes.INDEX['M']][:2, visemes.ROUND].max()

  assert first(moon) > first(mama) + 0.1  # the lips round before the vowel


def test_activity_is_low_in_silence_and_high_in_speech():
  utterance, track = track_of(phonemes.sentence(1))
  assert track.activity[0] < 0.35 and track.activity[-1] < 0.35
  assert np.median(track.activity) > 0.9


def test_mixing_is_monotone_in_the_jaw_and_closed_under_contact():
  jaws = np.linspace(0, 1, 21)
  viseme = np.zeros((21, 6))
  viseme[:, visemes.JAW] = jaws
  for emotional in (0.0, 0.3, 0.9):
    opened, _ = visemes.mix(
      np.full(21, emotional), np.zeros(21), viseme, np.ones(21), 1.0
    )
    assert (np.diff(opened) > 0).all()
    assert (
      opened[0] < emotional or emotional == 0
    )  # speech takes over the emotional jaw
  viseme[:, visemes.PRESS] = 1
  jaw, parting = visemes.mix(
    np.full(21, 0.9), np.full(21, 0.6), viseme, np.zeros(21), 1.0
  )
  assert (jaw == 0).all() and (parting == 0).all()

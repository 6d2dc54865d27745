"""The share of clips that show the requested emotion, on votes counted by hand."""

import numpy as np

from dicetalk_jax.metrics.emotion_accuracy import clip_vote, emotion_accuracy

SURE = np.log([0.05, 0.9, 0.05])  # of emotion 1
TORN = np.log([0.5, 0.3, 0.2])  # emotion 0, by little


def test_a_clip_votes_by_its_mean_log_probability():
  assert clip_vote(np.stack([TORN, TORN, SURE])) == 1


def test_accuracy_is_given_over_all_clips_and_by_level():
  clips = [SURE[None], TORN[None], TORN[None], SURE[None]]
  assert emotion_accuracy(clips, emotions=[1, 0, 1, 1], levels=[3, 1, 1, 2]) == {
    'emo_acc': 0.75,
    'emo_acc_level_1': 0.5,
    'emo_acc_level_2': 1.0,
    'emo_acc_level_3': 1.0,
    'emo_acc_strong': 1.0,
  }


def test_without_levels_there_is_one_score():
  assert emotion_accuracy([SURE[None], TORN[None]], [1, 1]) == {'emo_acc': 0.5}


def test_subtle_clips_alone_have_no_headline():
  scores = emotion_accuracy([SURE[None], TORN[None]], [1, 0], [1, 1])
  assert scores == {'emo_acc': 1.0, 'emo_acc_level_1': 1.0}

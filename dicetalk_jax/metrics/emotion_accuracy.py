"""How often clips show the requested emotion.

This is not the paper's Emo-Score, which is the mean of a classifier's probabilities for
four emotions, whatever the most probable one is.

For the evaluation of generated videos, which does not call it yet. Training does not:
`eval/emotion_accuracy` of the embedder's log is that of `clustering.summary`.
"""

from collections.abc import Sequence

import numpy as np


def clip_vote(log_probs: np.ndarray) -> int:
  """The emotion of a clip: the largest mean over frames.

  Args:
    log_probs: log probabilities [N, emotions].
  """
  return int(np.mean(log_probs, axis=0).argmax())


def emotion_accuracy(
  log_probs: Sequence[np.ndarray],
  emotions: Sequence[int],
  levels: Sequence[int] | None = None,
) -> dict[str, float]:
  """Share of clips whose vote is the requested emotion.

  Args:
    log_probs: per clip, log probabilities per frame [N_i, emotions].
    emotions: per clip, the index of the requested emotion.
    levels: per clip, its intensity 1-3. Level 1 is meant to be subtle and is hard to
      distinguish from neutral.

  Returns:
    'emo_acc' over all clips; with `levels` also 'emo_acc_level_<n>' and, as the
    headline, 'emo_acc_strong' (levels 2 and 3).
  """
  votes = np.array([clip_vote(clip) for clip in log_probs])
  right = votes == np.asarray(emotions)
  scores = {'emo_acc': float(right.mean())}
  if levels is None:
    return scores
  level_of = np.asarray(levels)
  for level in np.unique(level_of):
    scores[f'emo_acc_level_{level}'] = float(right[level_of == level].mean())
  strong = level_of >= 2
  if strong.any():
    scores['emo_acc_strong'] = float(right[strong].mean())
  return scores

"""Scores of generated clips, from what the judges read and from the exact truth.

`score_clip` scores one clip, `summarise` many. Identity counts only for clips that pass
lip-sync and emotion: otherwise a still portrait would win.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from dicetalk_jax.errors import InputError
from dicetalk_jax.metrics.judges import Reading
from dicetalk_jax.metrics.lip_sync import LipSync, lip_sync

# A clip passes lip-sync with a correlation of at least this, without an offset. True
# clips have .9 and more, other sentences about 0.
LEAST_SYNC = 0.5
CLOSED = 0.05  # largest opening of closed lips, in face units
STRONG = 2  # the least level of the headline: level 1 is subtle by design

_RESAMPLES = 1000
_INTERVAL = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class ClipScores:
  """Scores of one clip.

  Attributes:
    person: index of the person in the gallery.
    asked, level: emotion and intensity that were asked for.
    recognised: emotion that is seen.
    emotion_right: whether it is the one that was asked for.
    strength: mean intensity that is seen, 0 to 1.
    sync: lip-sync with the true opening.
    closure: share of the frames with closed lips in which they are; NaN without any.
    nearest: index of the person of the gallery that is most similar.
    identity_right: whether it is the right one.
    identity_similarity: mean cosine of the frames with the right person.
  """

  person: int
  asked: str
  level: int
  recognised: str
  emotion_right: bool
  strength: float
  sync: LipSync
  closure: float
  nearest: int
  identity_right: bool
  identity_similarity: float

  @property
  def in_sync(self) -> bool:
    return self.sync.offset == 0 and self.sync.correlation >= LEAST_SYNC

  @property
  def identity_counts(self) -> bool:
    """Whether the clip speaks and shows the emotion: the rule of this module."""
    return self.in_sync and self.emotion_right


class Estimate(NamedTuple):
  """A mean over clips, with its 95 % bootstrap interval over people.

  Attributes:
    mean: NaN without clips.
    low, high: the interval.
    clips: how many clips count.
  """

  mean: float
  low: float
  high: float
  clips: int


def score_clip(
  reading: Reading,
  *,
  asked: str,
  opening: np.ndarray,
  fps: float,
  gallery: np.ndarray,
  person: int,
  level: int = 3,
  closed: np.ndarray | None = None,
) -> ClipScores:
  """Compares what the judges read with what was asked for.

  Args:
    reading: of N frames.
    asked: the emotion.
    opening: [N] true mouth opening at these frames.
    fps: frames per second.
    gallery: [P,64] unit embeddings of people, see `Reading.embedding`.
    person: index of the right one.
    level: intensity of the emotion.
    closed: bool [N], frames in which lips must touch: the middles of P, B and M.
  """
  to_people = gallery @ reading.embedding
  nearest = int(to_people.argmax())
  shut = np.zeros(0) if closed is None else reading.opening[np.asarray(closed, bool)]
  return ClipScores(
    person=person,
    asked=asked,
    level=level,
    recognised=reading.recognised,
    emotion_right=reading.recognised == asked,
    strength=float(reading.strength.mean()),
    sync=lip_sync(reading.opening, opening, fps),
    closure=float((shut < CLOSED).mean()) if len(shut) else float('nan'),
    nearest=nearest,
    identity_right=nearest == person,
    identity_similarity=float((reading.identity @ gallery[person]).mean()),
  )


def summarise(scores: Sequence[ClipScores], seed: int = 0) -> dict[str, Estimate]:
  """Means over clips.

  Args:
    scores: of all clips.
    seed: of the bootstrap. It draws people, not clips: those of one person are alike.

  Returns:
    emotion: share of clips of level 2 and 3 that show the emotion (neutral included,
      which has no level); emotion_subtle: of level 1; strength: of level 2 and 3.
    sync: mean lip-sync correlation; offset_0: share of clips without an offset;
      sync_confidence; closure.
    passed: share of clips that pass lip-sync and emotion. Of these alone: identity, the
      share whose nearest person is the right one, and identity_similarity.
    all_right: share of all clips that pass all three.

  Raises:
    InputError: there is no clip.
  """
  if not scores:
    raise InputError('there are no clips to summarise; score some first')

  def strong(s: ClipScores) -> bool:
    return s.level >= STRONG or s.asked == 'neutral'

  counted: dict[str, tuple[Callable, Callable]] = {  # (which clips, what of them)
    'emotion': (strong, lambda s: s.emotion_right),
    'emotion_subtle': (lambda s: not strong(s), lambda s: s.emotion_right),
    'strength': (strong, lambda s: s.strength),
    'sync': (_always, lambda s: s.sync.correlation),
    'offset_0': (_always, lambda s: s.sync.offset == 0),
    'sync_confidence': (_always, lambda s: s.sync.confidence),
    'closure': (lambda s: not np.isnan(s.closure), lambda s: s.closure),
    'passed': (_always, lambda s: s.identity_counts),
    'identity': (lambda s: s.identity_counts, lambda s: s.identity_right),
    'identity_similarity': (
      lambda s: s.identity_counts,
      lambda s: s.identity_similarity,
    ),
    'all_right': (_always, lambda s: s.identity_counts and s.identity_right),
  }
  return {
    name: _estimate(
      np.array([float(value(s)) for s in scores if counts(s)]),
      np.array([s.person for s in scores if counts(s)]),
      seed,
    )
    for name, (counts, value) in counted.items()
  }


def seam(frames: np.ndarray, window: int) -> float:
  """How much more a clip changes where windows meet than elsewhere.

  Args:
    frames: [N,H,W,3] of a clip that was generated window after window.
    window: frames from the start of one window to that of the next.

  Returns:
    Mean absolute change from the last frame of a window to the first of the next, over
    that of all other neighbours. 1 without seams.

  Raises:
    InputError: there are no two windows.
  """
  change = np.abs(np.diff(frames.astype(np.float32), axis=0)).mean((1, 2, 3))
  at_border = np.arange(1, len(frames)) % window == 0
  if not at_border.any() or at_border.all():
    raise InputError(
      f'{len(frames)} frames hold no two windows of {window}; score a longer clip'
    )
  return float(change[at_border].mean() / max(change[~at_border].mean(), 1e-6))


def drift(reading: Reading, fps: float = 12.5) -> float:
  """How far a face has moved away from itself at the end of a clip.

  Args:
    reading: of at least two seconds.
    fps: frames per second.

  Returns:
    Mean cosine of the frames of the first second with each other, minus that with the
    frames of the last second. Near 0 for the same person, up to about 1 for another.

  Raises:
    InputError: the clip is too short.
  """
  second = round(fps)
  if len(reading.identity) < 2 * second:
    raise InputError(
      f'{len(reading.identity)} frames at {fps} per second are too few to drift; score '
      'at least two seconds'
    )
  first = reading.identity[:second]
  last = reading.identity[-second:]
  among_first = (first @ first.T)[~np.eye(second, dtype=bool)]
  return float(among_first.mean() - (first @ last.T).mean())


def _always(scores: ClipScores) -> bool:
  return True


def _estimate(values: np.ndarray, people: np.ndarray, seed: int) -> Estimate:
  """The mean, and its interval from resampled people."""
  if not len(values):
    return Estimate(float('nan'), float('nan'), float('nan'), 0)
  _, index = np.unique(people, return_inverse=True)
  sums = np.bincount(index, values)
  counts = np.bincount(index)
  drawn = np.random.default_rng(seed).integers(len(sums), size=(_RESAMPLES, len(sums)))
  means = sums[drawn].sum(1) / counts[drawn].sum(1)
  low, high = np.quantile(means, _INTERVAL)
  return Estimate(float(values.mean()), float(low), float(high), len(values))

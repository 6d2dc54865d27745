"""What the judges read in the videos of the demo."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from dicetalk_jax.metrics.clip_scores import ClipScores, score_clip
from dicetalk_jax.metrics.judges import Judges
from examples.demo.clips import Clip
from examples.demo_data import SIZE, cases

COMPARED = 24  # unseen people among whom a face must be the nearest


@dataclasses.dataclass(frozen=True)
class Gallery:
  """The people among whom the judges look for the one in a video.

  Attributes:
    people: seeds of the P people.
    embeddings: `[P,64]` of their portraits.
  """

  people: list[int]
  embeddings: np.ndarray

  @classmethod
  def of_unseen(cls, judges: Judges, count: int = COMPARED) -> 'Gallery':
    """The portraits of the first `count` people that the model is tested on."""
    first_case = {}
    for case in cases(count):
      first_case.setdefault(case.identity, case)
    embeddings = []
    for case in first_case.values():
      portrait, face = case.portrait(SIZE)
      embeddings.append(judges.read(portrait[None], face).embedding)
    return cls(list(first_case), np.stack(embeddings))


def judge(judges: Judges, gallery: Gallery, clip: Clip) -> dict[str, ClipScores]:
  """Scores every video of a clip, by its kind."""
  return {
    kind: score_clip(
      judges.read(frames, clip.face),
      asked=clip.case.emotion,
      opening=clip.opening,
      fps=clip.fps,
      gallery=gallery.embeddings,
      person=gallery.people.index(clip.case.identity),
    )
    for kind, frames in clip.videos.items()
  }


def told(scores: ClipScores) -> dict[str, Any]:
  """What the report says of one video."""
  return {
    'recognised': scores.recognised,
    'emotion_right': bool(scores.emotion_right),
    'strength': round(scores.strength, 3),
    'lip_sync': round(scores.sync.correlation, 3),
    'lip_sync_offset': round(scores.sync.offset_seconds, 3),
    'identity_right': bool(scores.identity_right),
    'identity_counts': bool(scores.identity_counts),
    'identity_similarity': round(scores.identity_similarity, 3),
  }


def summarise(scores: Sequence[ClipScores]) -> dict[str, Any]:
  """What the report says of all videos of a kind; at least one."""
  counted = [score for score in scores if score.identity_counts]
  similarity = np.mean([score.identity_similarity for score in scores])
  return {
    'clips': len(scores),
    'emotions_right': sum(bool(score.emotion_right) for score in scores),
    'lip_sync': round(float(np.mean([score.sync.correlation for score in scores])), 3),
    'identities_counted': len(counted),
    'identities_right': sum(bool(score.identity_right) for score in counted),
    'identity_similarity': round(float(similarity), 3),
  }

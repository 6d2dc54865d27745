"""The rows of the table: what the judges read, against what was asked for.

Besides the generated clips and the truth there are true clips that are spoilt on
purpose, see `sanity_rows`: each must lose what it spoils and keep the rest.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from benchmarks.demo_table import work
from benchmarks.demo_table.clips import case_name
from benchmarks.demo_table.journal import Journal
from dicetalk_jax.errors import InputError
from dicetalk_jax.metrics import clip_scores
from dicetalk_jax.metrics.clip_scores import ClipScores, Estimate
from dicetalk_jax.metrics.face_distance import FaceDistance, FaceSpace
from dicetalk_jax.metrics.judges import Judges, Reading
from examples.demo_data import Case
from examples.judges import sanity_rows
from examples.judges.sanity_rows import Sample

# True clips whose readings are at hand, held against something else.
COMPARED: dict[str, sanity_rows.Spoil] = {
  'shuffled audio': sanity_rows.other_sentence,
  f'audio shifted by {sanity_rows.LATE} frames': sanity_rows.late,
  'wrong emotion': sanity_rows.wrong_emotion,
  'still image': sanity_rows.still_image,
  'other identity': sanity_rows.other_person,
}
ROWS = (work.GENERATED, work.TRUTH, work.AUTOENCODED, *COMPARED, *work.SPOILT)
MEASURED = ('psnr', 'seam')  # facts of the journal


@dataclasses.dataclass(frozen=True)
class Row:
  """A finished row.

  Attributes:
    scores: of each clip, in the order of the cases.
    summary: see `clip_scores.summarise`, and `psnr`, `seam` and `drift`.
    distance: of all frames from those of the references.
  """

  scores: list[ClipScores]
  summary: dict[str, Estimate]
  distance: FaceDistance


class Scorer:
  """Scores rows of a journal that has the truth and the references."""

  def __init__(
    self, cases: Sequence[Case], journal: Journal, judges: Judges, fps: float
  ):
    people = list(dict.fromkeys(case.identity for case in cases))
    self._journal = journal
    self._judges = judges
    self._fps = fps
    self._truth = [
      work.true_sample(journal, case, people.index(case.identity)) for case in cases
    ]
    references = [work.read_of(journal, work.REFERENCE, case) for case in cases]
    self._galleries = galleries(cases, references)
    self._features = np.concatenate([reading.features for reading in references])
    self._space = FaceSpace.fit(self._features)

  def row(self, name: str) -> Row:
    """Scores a row of `ROWS`."""
    if name in COMPARED:
      samples = COMPARED[name](self._truth, self._judges)
    else:
      samples = [
        dataclasses.replace(
          sample, reading=work.read_of(self._journal, name, sample.case)
        )
        for sample in self._truth
      ]
    scores = [
      clip_scores.score_clip(
        sample.reading,
        asked=sample.asked,
        level=sample.case.level,
        opening=sample.opening,
        closed=sample.closed,
        fps=self._fps,
        gallery=self._galleries[sample.case.emotion],
        person=sample.person,
      )
      for sample in samples
    ]
    features = np.concatenate([sample.reading.features for sample in samples])
    return Row(
      scores,
      clip_scores.summarise(scores) | self._measured(name, samples),
      self._space.distance(self._features, features),
    )

  def _measured(self, row: str, samples: Sequence[Sample]) -> dict[str, Estimate]:
    """Means over the clips that have the value."""
    values = {'drift': [self._drift(sample.reading) for sample in samples]}
    for name in MEASURED:
      values[name] = [self._fact(row, sample.case, name) for sample in samples]
    people = np.array([sample.person for sample in samples])
    estimates = {}
    for name, found in values.items():
      known = np.isfinite(found)
      estimates[name] = clip_scores.estimate(np.array(found)[known], people[known])
    return estimates

  def _fact(self, row: str, case: Case, name: str) -> float:
    if row in COMPARED:
      return np.nan
    return self._journal.facts(row, case_name(case)).get(name, np.nan)

  def _drift(self, reading: Reading) -> float:
    try:
      return clip_scores.drift(reading, self._fps)
    except InputError:  # too short, where its end was cut off
      return np.nan


def galleries(
  cases: Sequence[Case], references: Sequence[Reading]
) -> dict[str, np.ndarray]:
  """What the people look like, for clips of each emotion.

  Nobody is recognised by the clip that is judged, nor by its emotion: an entry is the
  mean direction of the person's reference clips in the seven other emotions.

  Args:
    cases: the cases of the references.
    references: true clips that are not judged.

  Returns:
    Emotion to unit vectors `[P,64]`, people in the order of the cases.
  """
  people = dict.fromkeys(case.identity for case in cases)
  found = {}
  for emotion in {case.emotion for case in cases}:
    sums = [
      sum(
        reading.embedding
        for case, reading in zip(cases, references)
        if case.identity == person and case.emotion != emotion
      )
      for person in people
    ]
    found[emotion] = np.stack([total / np.linalg.norm(total) for total in sums])
  return found

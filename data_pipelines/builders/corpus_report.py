"""The report of a preparation: what it made, and what it left out and why."""

import collections
from collections.abc import Mapping, Sequence
import csv
import dataclasses
import io
import json
from typing import Any, Self

from etils import epath

from data_pipelines.builders.corpus_plan import Plan
from data_pipelines.clip_cache import Outcome
from data_pipelines.corpora.clip_file import UNEXPECTED, ClipFile, Skipped, reasons
from dicetalk_jax.data.clip_record import FPS


@dataclasses.dataclass(frozen=True)
class Report:
  """The outcome of a preparation: clips made and files left out.

  Attributes:
    corpus: its name.
    splits: numbers of clips, hours, people and labels of each split with clips.
    skipped: everything left out.
    notes: what the user should know.
  """

  corpus: str
  splits: Mapping[str, Mapping[str, Any]]
  skipped: tuple[Skipped, ...]
  notes: tuple[str, ...]

  @classmethod
  def of(
    cls,
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    prepared: Mapping[str, Sequence[ClipFile]],
    notes: Sequence[str] = (),
  ) -> Self:
    """Sums up a preparation.

    Args:
      plan: the plan.
      outcomes: by clip id.
      prepared: the clips with records, by split.
      notes: what the user should know besides the notes of the plan.
    """
    skipped = list(plan.skipped)
    for clips in plan.clips.values():
      for clip in clips:
        skipped += outcomes[clip.clip_id].skipped
    splits = {split: _count(clips, outcomes) for split, clips in prepared.items()}
    notes = [*plan.notes, *notes]
    failed = sum(skip.reason == UNEXPECTED for skip in skipped)
    if failed:
      notes.append(
        f'{failed} clips met errors that may be temporary, see skipped.csv; to try '
        'them again, delete the folder of the data set and give the same command'
      )
    return cls(plan.config.corpus, splits, tuple(skipped), tuple(notes))

  def summary(self) -> str:
    """Describes the data set in a few lines for the terminal."""
    lines = []
    for split, counts in self.splits.items():
      lines.append(
        f'{split:5} {counts["clips"]:7} clips {counts["hours"]:9.2f} h '
        f'{counts["people"]:5} people'
      )
    lines.append(f'left out: {reasons(self.skipped)}')
    lines += [f'note: {note}' for note in self.notes]
    return '\n'.join(lines)

  def csv(self) -> str:
    """Makes a table with one line per clip or file that was left out."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator='\n')
    writer.writerow([field.name for field in dataclasses.fields(Skipped)])
    writer.writerows(dataclasses.astuple(skip) for skip in self.skipped)
    return buffer.getvalue()

  def save(self, folder: epath.Path) -> None:
    """Writes `skipped.csv`, and then `report.json`, which marks a whole data set."""
    (folder / 'skipped.csv').write_text(self.csv())
    (folder / 'report.json').write_text(json.dumps(dataclasses.asdict(self), indent=1))

  @classmethod
  def load(cls, folder: epath.Path) -> Self:
    """Reads `report.json`."""
    fields = json.loads((folder / 'report.json').read_text())
    return cls(
      corpus=fields['corpus'],
      splits=fields['splits'],
      skipped=tuple(Skipped(**skip) for skip in fields['skipped']),
      notes=tuple(fields['notes']),
    )


def _count(
  clips: Sequence[ClipFile], outcomes: Mapping[str, Outcome]
) -> dict[str, Any]:
  """Counts the records of the prepared clips of a split."""
  records = 0
  frames = 0
  without_expression = 0
  emotions: collections.Counter[str] = collections.Counter()
  for clip in clips:
    outcome = outcomes[clip.clip_id]
    records += len(outcome.keys)
    frames += sum(outcome.frames)
    without_expression += outcome.without_expression
    emotions[clip.emotion] += len(outcome.keys)
  return {
    'clips': records,
    'hours': round(frames / FPS / 3600, 4),
    'people': len({clip.identity for clip in clips}),
    'emotions': dict(sorted(emotions.items())),
    'without_expression': without_expression,
  }

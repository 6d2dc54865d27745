"""What a preparation made, and what it left out and why."""

import collections
from collections.abc import Mapping
import csv
import dataclasses
import io
import json
from typing import Any, Self

from etils import epath

from data_pipelines.builders.corpus_plan import Plan
from data_pipelines.clip_cache import Outcome
from data_pipelines.corpora.clip_file import UNEXPECTED, Skipped, reasons
from dicetalk_jax.data.clip_record import FPS


@dataclasses.dataclass(frozen=True)
class Report:
  """Splits that are not empty, with numbers of clips, hours, people and labels; and
  everything left out.
  """

  corpus: str
  splits: Mapping[str, Mapping[str, Any]]
  skipped: tuple[Skipped, ...]
  notes: tuple[str, ...]

  @classmethod
  def of(cls, plan: Plan, outcomes: Mapping[str, Outcome]) -> Self:
    """Sums up; `outcomes` by clip id."""
    parts, skipped = {}, list(plan.skipped)
    for split, clips in plan.clips.items():
      people, emotions, count, frames, without = set(), collections.Counter(), 0, 0, 0
      for clip in clips:
        outcome = outcomes[clip.clip_id]
        skipped += outcome.skipped
        if outcome.keys:
          people.add(clip.identity)
          emotions[clip.emotion] += len(outcome.keys)
          count, frames = count + len(outcome.keys), frames + sum(outcome.frames)
          without += outcome.without_expression
      if count:
        parts[split] = {
          'clips': count,
          'hours': round(frames / FPS / 3600, 4),
          'people': len(people),
          'emotions': dict(sorted(emotions.items())),
          'without_expression': without,
        }
    notes = list(plan.notes)
    if failed := sum(skip.reason == UNEXPECTED for skip in skipped):
      notes.append(
        f'{failed} clips met errors that may pass, see skipped.csv; to try them again, '
        'delete the folder of the data set and give the same command'
      )
    return cls(plan.config.corpus, parts, tuple(skipped), tuple(notes))

  def summary(self) -> str:
    """A few lines for the terminal."""
    lines = [
      f'{split:5} {part["clips"]:7} clips {part["hours"]:9.2f} h {part["people"]:5} '
      'people'
      for split, part in self.splits.items()
    ]
    return '\n'.join(
      [
        *lines,
        f'left out: {reasons(self.skipped)}',
        *(f'note: {note}' for note in self.notes),
      ]
    )

  def csv(self) -> str:
    """One line per clip or file that was left out."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator='\n')
    writer.writerow([field.name for field in dataclasses.fields(Skipped)])
    writer.writerows(dataclasses.astuple(skip) for skip in self.skipped)
    return buffer.getvalue()

  def save(self, folder: epath.Path):
    """Writes `skipped.csv` and `report.json`, this one last."""
    (folder / 'skipped.csv').write_text(self.csv())
    (folder / 'report.json').write_text(json.dumps(dataclasses.asdict(self), indent=1))

  @classmethod
  def load(cls, folder: epath.Path) -> Self:
    fields = json.loads((folder / 'report.json').read_text())
    fields['skipped'] = tuple(Skipped(**skip) for skip in fields['skipped'])
    return cls(**fields | {'notes': tuple(fields['notes'])})

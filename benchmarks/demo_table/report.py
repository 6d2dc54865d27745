"""The table as text, Markdown and JSON."""

from collections.abc import Mapping, Sequence
import json
import math
from typing import Any

from benchmarks.demo_table.journal import Facts
from benchmarks.demo_table.rows import Row
from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.metrics import clip_scores
from dicetalk_jax.metrics.clip_scores import ClipScores, Estimate
from examples.demo_data import Case

# Heading -> score of `Row.summary`, digits, whether its interval is shown.
COLUMNS = {
  'emotion': ('emotion', 2, True),
  'lip-sync r': ('sync', 2, True),
  'no offset': ('offset_0', 2, False),
  'identity': ('identity', 2, True),
  'all right': ('all_right', 2, True),
  'PSNR, dB': ('psnr', 1, False),
  'drift': ('drift', 2, False),
  'seams': ('seam', 2, False),
}
_NOTHING = '-'
_NOTES = """\
{people} unseen people in {emotions} emotions of level {levels}, {clips} clips. In
brackets: 95 % intervals from resampled people.

- Emotion: share of clips in which the judges see what was asked for.
- Lip-sync: correlation of the opening that the judges see with the true one. No offset:
  share of clips in which no shift fits better.
- Identity: share of clips whose nearest of {people} people is the right one, of those
  clips alone that show the emotion and speak (r of at least {least:g}, no offset). A
  person is represented by other true clips, with other words and in the seven other
  emotions.
- All right: share of all clips that show the emotion, speak, and are the right person.
- PSNR: against the rendered truth, frame by frame. Generated heads and eyes move in
  their own way, which lowers theirs.
- Drift: how much identity similarity falls from the first second to the last.
- Seams: change at window borders over change elsewhere.
- Fréchet: distance of the judges' features of {frames} frames from those of other
  true clips of the same people, in variances. The row of the truth is what chance alone
  gives.

Made with {made_with}.
"""

Table = Mapping[str, Row]


def markdown(table: Table, cases: Sequence[Case], made_with: Facts) -> str:
  """The table, how to read it, and what it was made with."""
  people = len({case.identity for case in cases})
  frames = next(iter(table.values())).distance.frames
  headings = ['', *COLUMNS, 'Fréchet']
  lines = [
    '| ' + ' | '.join(headings) + ' |',
    '| --- |' + ' ---: |' * (len(headings) - 1),
  ]
  lines += ['| ' + ' | '.join(cells) + ' |' for cells in _lines(table)]
  notes = _NOTES.format(
    people=people,
    emotions=len(EMOTIONS),
    levels=' and '.join(str(level) for level in sorted({c.level for c in cases})),
    clips=len(cases),
    least=clip_scores.LEAST_SYNC,
    frames=frames,
    made_with=', '.join(f'{name} {made_with[name]}' for name in _shown(made_with)),
  )
  return '\n'.join(lines) + '\n\n' + notes


def by_emotion(row: Row) -> dict[str, dict[str, Estimate]]:
  """The summary of the clips of each emotion that was asked for."""
  return {
    emotion: clip_scores.summarise(own)
    for emotion in EMOTIONS
    if (own := [score for score in row.scores if score.asked == emotion])
  }


def confusion(row: Row) -> list[list[int]]:
  """How many clips of each emotion (downwards) look like which (to the right)."""
  pairs = [(score.asked, score.recognised) for score in row.scores]
  return [[pairs.count((asked, seen)) for seen in EMOTIONS] for asked in EMOTIONS]


def as_json(table: Table, cases: Sequence[Case], made_with: Facts) -> str:
  """Everything in the table, down to the single clips."""
  rows = {
    name: {
      'summary': {key: _estimate(x) for key, x in row.summary.items()},
      'frechet': row.distance._asdict(),
      'emotions': {
        emotion: {key: _estimate(x) for key, x in summary.items()}
        for emotion, summary in by_emotion(row).items()
      },
      'confusion': confusion(row),
      'clips': [_clip(case, score) for case, score in zip(cases, row.scores)],
    }
    for name, row in table.items()
  }
  content = {'made_with': made_with, 'emotions': EMOTIONS, 'rows': rows}
  return json.dumps(content, indent=1) + '\n'


def text(table: Table) -> str:
  """The table for a terminal."""
  rows = [['', *COLUMNS, 'Fréchet'], *_lines(table)]
  widths = [max(map(len, column)) for column in zip(*rows)]
  return '\n'.join(
    '  '.join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows
  )


def _lines(table: Table) -> list[list[str]]:
  """The cells of all rows."""
  return [
    [
      name,
      *(_cell(row.summary[key], *style) for key, *style in COLUMNS.values()),
      f'{row.distance.distance:.3f}',
    ]
    for name, row in table.items()
  ]


def _cell(x: Estimate, digits: int, interval: bool) -> str:
  if not x.clips:
    return _NOTHING
  mean, low, high = (f'{value:.{digits}f}' for value in (x.mean, x.low, x.high))
  return f'{mean} ({low}, {high})' if interval else mean


def _shown(made_with: Facts) -> list[str]:
  """What a reader needs to make the table again."""
  return [
    name for name in made_with if name.split('.')[0] in ('judges', 'model', 'seed')
  ]


def _estimate(x: Estimate) -> dict[str, Any]:
  """JSON has no NaN."""
  return {
    name: None if math.isnan(value) else round(value, 4)
    for name, value in x._asdict().items()
  }


def _clip(case: Case, score: ClipScores) -> dict[str, Any]:
  return {
    'identity': case.identity,
    'asked': score.asked,
    'level': score.level,
    'recognised': score.recognised,
    'strength': round(score.strength, 3),
    'sync': round(score.sync.correlation, 3),
    'offset': score.sync.offset,
    'confidence': round(score.sync.confidence, 3),
    'identity_right': score.identity_right,
    'identity_similarity': round(score.identity_similarity, 3),
  }

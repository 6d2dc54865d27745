"""Figures of a table, and contact sheets of its people."""

from collections.abc import Mapping, Sequence
import pathlib

from matplotlib.figure import Figure
import numpy as np

from benchmarks.demo_table import report, work
from benchmarks.demo_table.clips import case_name
from benchmarks.demo_table.journal import Journal
from benchmarks.demo_table.rows import Row
from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.files import atomic_file
from dicetalk_jax.media import contact_sheet
from examples.demo_data import Case

COLUMNS = 8  # frames of a clip on a sheet
_DRAWN = (work.GENERATED, work.AUTOENCODED, work.TRUTH)


def draw_confusion(table: Mapping[str, Row], path: pathlib.Path) -> None:
  """Draws which emotions were asked for and which were seen, of generated and true
  clips.
  """
  rows = {name: table[name] for name in (work.GENERATED, work.TRUTH) if name in table}
  figure = Figure(figsize=(5 * len(rows), 4.8), layout='constrained')
  for i, (name, row) in enumerate(rows.items(), 1):
    counts = np.array(report.confusion(row))
    axes = figure.add_subplot(1, len(rows), i, title=name, xlabel='seen')
    axes.imshow(counts, cmap='Blues', vmin=0, vmax=counts.sum(1).max())
    axes.set_xticks(range(len(EMOTIONS)), EMOTIONS, rotation=45, ha='right')
    axes.set_yticks(range(len(EMOTIONS)), EMOTIONS)
    axes.set_ylabel('asked for')
    for asked, seen in np.argwhere(counts):
      many = counts[asked, seen] > counts.max() / 2
      axes.text(
        seen,
        asked,
        counts[asked, seen],
        ha='center',
        va='center',
        color='white' if many else 'black',
      )
  _save(figure, path)


def draw_lip_sync(table: Mapping[str, Row], path: pathlib.Path) -> None:
  """Draws the lip-sync correlation in each emotion, with 95 % intervals."""
  figure = Figure(figsize=(7, 3.6), layout='constrained')
  axes = figure.add_subplot(ylabel='lip-sync correlation')
  rows = {name: table[name] for name in _DRAWN if name in table}
  for offset, (name, row) in zip(np.linspace(-0.2, 0.2, len(rows)), rows.items()):
    found = report.by_emotion(row)
    sync = [found[emotion]['sync'] for emotion in found]
    mean = np.array([x.mean for x in sync])
    errors = [mean - [x.low for x in sync], [x.high for x in sync] - mean]
    at = [EMOTIONS.index(emotion) + offset for emotion in found]
    axes.errorbar(at, mean, errors, fmt='o', capsize=3, label=name)
  axes.set_xticks(range(len(EMOTIONS)), EMOTIONS)
  axes.grid(axis='y', alpha=0.3)
  axes.legend(fontsize='small')
  _save(figure, path)


def draw_sheets(cases: Sequence[Case], journal: Journal, folder: pathlib.Path) -> None:
  """Draws one sheet for each person: all emotions, the truth above what was made."""
  for person in dict.fromkeys(case.identity for case in cases):
    rows = []
    for case in cases:
      if case.identity != person:
        continue
      for row, source in ((work.TRUTH, work.RENDERING), (work.GENERATED,) * 2):
        if journal.has(row, case_name(case)):
          frames = journal.arrays(source, case_name(case), 'frames')['frames']
          rows.append((f'{case.prior}: {row}', spread(frames)))
    contact_sheet.contact_sheet(rows, path=folder / f'{person}.png')


def spread(frames: np.ndarray, count: int = COLUMNS) -> list[np.ndarray]:
  """Frames at equal distances, the first and the last among them."""
  return [*frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]]


def _save(figure: Figure, path: pathlib.Path) -> None:
  with atomic_file(path) as part:
    figure.savefig(part, format='png', dpi=110)

"""Can a person name the emotions without having seen what was asked for?

    python -m benchmarks.blind_naming --table=runs/table --output=runs/kit
    python -m benchmarks.blind_naming --table=runs/table --answers=runs/kit/answers.csv

The first form draws clips of the strongest level from a finished table, and writes one
image of each, and `answers.csv` to be filled in. One part of the kit is generated, the
other one true; which is which, and what was asked for, is in the folder of the table.
The second form counts the right answers.
"""

import argparse
import csv
import json
import pathlib
from typing import Any

import numpy as np

from benchmarks.demo_table import work
from benchmarks.demo_table.journal import Facts, Journal
from benchmarks.demo_table.pictures import spread
from dicetalk_jax import cli
from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.errors import ConfigError, DataError, InputError
from dicetalk_jax.files import atomic_file, atomic_folder
from dicetalk_jax.media import contact_sheet
from examples.demo_data import STRONGEST

SOURCES = {work.GENERATED: work.GENERATED, work.TRUTH: work.RENDERING}
PARTS = ('part_1', 'part_2')
SEALED = 'blind_naming_{seed}.json'  # in the folder of the table
FORM = 'answers.csv'
HEADINGS = ('clip', 'emotion')
SCALE = 4
COLUMNS = 4  # of an image; its frames are in two lines

Key = dict[str, dict[str, str]]  # clip of the kit -> `row`, `clip` and `asked`


def _parser() -> argparse.ArgumentParser:
  parser = cli.OptionParser(
    prog='python -m benchmarks.blind_naming',
    description='Makes a kit for naming emotions blindly, or counts the answers.',
  )
  add = parser.add_argument
  add(
    '--table',
    required=True,
    type=pathlib.Path,
    metavar='DIR',
    help='a finished table, from python -m benchmarks.demo_table',
  )
  add('--output', type=pathlib.Path, metavar='DIR', help='the kit to be made')
  add('--answers', type=pathlib.Path, metavar='FILE', help='a form that is filled in')
  add('--clips', type=int, default=20, help='generated ones, and as many true ones')
  add('--seed', type=int, default=0, help='of the kit: another one draws other clips')
  return parser


def main(argv: list[str]) -> None:
  """Makes a kit, or scores its answers."""
  flags = _parser().parse_args(argv)
  if (flags.output is None) == (flags.answers is None):
    raise ConfigError('give either --output, to make a kit, or --answers, to score one')
  sealed = flags.table / SEALED.format(seed=flags.seed)
  if flags.answers is None:
    make_kit(flags.table, flags.output, sealed, flags.clips, flags.seed)
    print(f'{flags.output}: name the clips in {FORM}; the key is {sealed}')
    return
  for row, (right, clips, wrong) in score(sealed, flags.answers).items():
    print(f'{row}: {right} of {clips} named')
    for line in wrong:
      print(f'  {line}')


def make_kit(
  table: pathlib.Path, kit: pathlib.Path, sealed: pathlib.Path, clips: int, seed: int
) -> None:
  """Writes the images, the form, and the key.

  Args:
    table: folder of a finished table.
    kit: folder to be made.
    sealed: the key.
    clips: how many of each part.
    seed: of the draw.

  Raises:
    InputError: the kit exists, or the key of another one.
    DataError: the table has too few clips.
  """
  if kit.exists():
    raise InputError(f'{kit} exists; choose another place')
  journal = Journal.open(table)
  key = draw(journal.lines, clips, seed)
  if sealed.exists() and _read_key(sealed) != key:
    raise InputError(f'{sealed} is the key of another kit; give another --seed')
  with atomic_file(sealed) as part:
    part.write_text(json.dumps(key, indent=1) + '\n')
  with atomic_folder(kit) as folder:
    for name, drawn in key.items():
      arrays = journal.arrays(SOURCES[drawn['row']], drawn['clip'], 'frames')
      shown = spread(arrays['frames'], 2 * COLUMNS)
      rows = [('', shown[:COLUMNS]), ('', shown[COLUMNS:])]
      contact_sheet.contact_sheet(rows, scale=SCALE, path=folder / f'{name}.png')
    with (folder / FORM).open('w', newline='') as file:
      csv.writer(file).writerows([HEADINGS, *([name, ''] for name in key)])
    (folder / 'README.txt').write_text(
      f'Look at the frames of each clip and write its emotion into {FORM}, one of:\n'
      f'{", ".join(EMOTIONS)}\n'
    )


def draw(lines: list[Facts], clips: int, seed: int) -> Key:
  """Draws clips of the strongest level: no true one is a generated one too.

  Args:
    lines: of the journal.
    clips: how many of each.
    seed: of the draw; it also decides which part is generated.

  Raises:
    DataError: there are too few.
  """
  rng = np.random.default_rng(seed)
  rows = [[*SOURCES][i] for i in rng.permutation(len(SOURCES))]
  taken: set[str] = set()
  key: Key = {}
  for part, row in zip(PARTS, rows):
    found = [
      line
      for line in lines
      if line['row'] == row and line['level'] == STRONGEST and line['clip'] not in taken
    ]
    if len(found) < clips:
      raise DataError(
        f'the table has {len(found)} clips of level {STRONGEST} left for the part '
        f'{row!r}, not {clips}; make it with more --people, or ask for fewer --clips'
      )
    for number, i in enumerate(rng.choice(len(found), clips, replace=False), 1):
      clip = found[i]['clip']
      taken.add(clip)
      key[f'{part}/clip_{number:02d}'] = {
        'row': row,
        'clip': clip,
        'asked': found[i]['asked'],
      }
  return key


def score(
  sealed: pathlib.Path, answers: pathlib.Path
) -> dict[str, tuple[int, int, list[str]]]:
  """Compares answers with the key.

  Returns:
    Row to how many clips were named rightly, of how many, and the others in words.

  Raises:
    InputError: there is no key, or an answer is missing or no emotion.
  """
  key, given = _read_key(sealed), _read_answers(answers)
  if missing := [name for name in key if name not in given]:
    raise InputError(f'{answers} has no answer for {missing[0]}; name all clips')
  result: dict[str, Any] = {}
  for row in SOURCES:
    drawn = {name: clip for name, clip in key.items() if clip['row'] == row}
    wrong = [
      f'{name}: {given[name]}, not {clip["asked"]} ({clip["clip"]})'
      for name, clip in drawn.items()
      if given[name] != clip['asked']
    ]
    result[row] = len(drawn) - len(wrong), len(drawn), wrong
  return result


def _read_key(path: pathlib.Path) -> Key:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as error:
    raise InputError(f'there is no key {path}; make a kit first') from error


def _read_answers(path: pathlib.Path) -> dict[str, str]:
  """Clip to emotion.

  Raises:
    InputError: there is no file, or an answer is no emotion.
  """
  try:
    rows = list(csv.reader(path.read_text().splitlines()))
  except FileNotFoundError as error:
    raise InputError(f'there are no answers {path}; check the path') from error
  answers = {}
  for row in rows:
    if not row or tuple(row) == HEADINGS:
      continue
    name, emotion = row[0].strip(), row[-1].strip().lower()
    if emotion not in EMOTIONS:
      raise InputError(
        f'{path}: {name} is named {emotion!r}; choose one of {", ".join(EMOTIONS)}'
      )
    answers[name] = emotion
  return answers


if __name__ == '__main__':
  cli.run(main, _parser())

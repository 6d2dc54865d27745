"""The kit for naming emotions blindly: what is drawn, what is hidden, what counts."""

import csv
import json

import numpy as np
from PIL import Image
import pytest

from benchmarks import blind_naming
from benchmarks.demo_table.journal import Journal
from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.errors import ConfigError, DataError, InputError

CLIPS = 5


@pytest.fixture
def table(tmp_path):
  journal = Journal.open(tmp_path / 'table', {'seed': 0})
  frames = np.zeros((30, 8, 8, 3), np.uint8)
  for person in range(4):
    for i, emotion in enumerate(EMOTIONS):
      for row in ('generated', 'rendering', 'truth'):
        journal.add(
          row,
          f'{person}_{emotion}',
          {'frames': frames},
          asked=emotion,
          level=2 + (person + i) % 2,
        )
  return tmp_path / 'table'


def make(table, kit, *flags, seed=0):
  flags = [f'--output={kit}', f'--clips={CLIPS}', f'--seed={seed}', *flags]
  blind_naming.main([f'--table={table}', *flags])
  return json.loads((table / f'blind_naming_{seed}.json').read_text())


def fill_in(kit, answers):
  """Writes the form, and returns its path."""
  path = kit / blind_naming.FORM
  with path.open(newline='') as file:
    heading, *lines = csv.reader(file)
  with path.open('w', newline='') as file:
    rows = [heading, *([name, answers.get(name, empty)] for name, empty in lines)]
    csv.writer(file).writerows(rows)
  return path


def test_the_kit_gives_nothing_away(table, tmp_path):
  kit = tmp_path / 'kit'
  key = make(table, kit)
  names = {path.relative_to(kit).as_posix() for path in kit.rglob('*.*')}
  assert names == {f'{name}.png' for name in key} | {'answers.csv', 'README.txt'}
  assert 'part_1/clip_01' in key and 'part_2/clip_05' in key
  with Image.open(kit / 'part_1' / 'clip_01.png') as image:
    assert image.width > 4 * 8 * 4 and image.height > 2 * 8 * 4
    assert not image.info
  form = (kit / 'answers.csv').read_text()
  assert not [emotion for emotion in EMOTIONS if emotion in form]


def test_clips_are_strong_different_and_drawn_by_the_seed(table, tmp_path):
  key = make(table, tmp_path / 'kit')
  clips = [drawn['clip'] for drawn in key.values()]
  assert len(set(clips)) == 2 * CLIPS
  for clip in clips:
    person, emotion = clip.split('_')
    assert (int(person) + EMOTIONS.index(emotion)) % 2 == 1
  rows = [drawn['row'] for drawn in key.values()]
  assert rows.count('generated') == rows.count('truth') == CLIPS
  assert make(table, tmp_path / 'again') == key
  assert make(table, tmp_path / 'other', seed=1) != key


def test_right_answers_are_counted(table, tmp_path, capsys):
  kit = tmp_path / 'kit'
  key = make(table, kit)
  answers = {name: drawn['asked'].title() for name, drawn in key.items()}
  name = next(name for name, drawn in key.items() if drawn['row'] == 'generated')
  answers[name] = 'fear' if key[name]['asked'] == 'sad' else 'sad'
  form = fill_in(kit, answers)
  capsys.readouterr()
  blind_naming.main([f'--table={table}', f'--answers={form}'])
  printed = capsys.readouterr().out.splitlines()
  assert printed[0] == f'generated: {CLIPS - 1} of {CLIPS} named'
  assert printed[1].startswith(f'  {name}: {answers[name]}, not {key[name]["asked"]}')
  assert printed[2] == f'truth: {CLIPS} of {CLIPS} named'


def test_forms_with_gaps_and_unknown_words_are_refused(table, tmp_path):
  kit = tmp_path / 'kit'
  key = make(table, kit)
  answers = dict.fromkeys(key, 'happy')
  form = fill_in(kit, answers | {'part_2/clip_02': 'bored'})
  with pytest.raises(InputError, match="part_2/clip_02 is named 'bored'; choose one"):
    blind_naming.main([f'--table={table}', f'--answers={form}'])
  form.write_text('part_1/clip_01,happy\n')
  with pytest.raises(InputError, match='no answer for part_1/clip_02; name all'):
    blind_naming.main([f'--table={table}', f'--answers={form}'])


def test_kits_that_cannot_be_made_are_refused(table, tmp_path):
  with pytest.raises(DataError, match='16 clips of level 3 left .* not 17'):
    make(table, tmp_path / 'kit', '--clips=17')
  with pytest.raises(InputError, match='has no table'):
    make(tmp_path / 'nothing', tmp_path / 'kit')
  with pytest.raises(ConfigError, match='either --output'):
    blind_naming.main([f'--table={table}'])
  make(table, tmp_path / 'kit')
  with pytest.raises(InputError, match='kit exists'):
    make(table, tmp_path / 'kit')
  with pytest.raises(InputError, match='key of another kit; give another --seed'):
    make(table, tmp_path / 'larger', '--clips=6')

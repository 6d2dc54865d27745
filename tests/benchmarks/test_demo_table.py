"""The table of the demo model: its journal, its galleries, its rows, its flags."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.demo_table import __main__ as command
from benchmarks.demo_table import clips, report, rows, work
from benchmarks.demo_table.clips import Truth, case_name
from benchmarks.demo_table.journal import Journal
from dicetalk_jax.data.clip_record import EMOTIONS
from dicetalk_jax.diffusion.sampler import SamplerConfig
from dicetalk_jax.errors import ConfigError, InputError
from dicetalk_jax.metrics.judges import Reading
from dicetalk_jax.settings import Settings
from examples.demo_data import Case

FRAMES = 30
PEOPLE = 3
CASES = [
  Case(identity, 100 * identity + i, emotion, 2 + (identity + i) % 2)
  for identity in range(PEOPLE)
  for i, emotion in enumerate(EMOTIONS)
]
NUMBERS = {case_name(case): i for i, case in enumerate(CASES)}
SETTINGS = Settings(image_size=8, sampler=SamplerConfig(num_steps=3, frames=4, shift=1))


def opening(case: Case, frames: int = FRAMES) -> np.ndarray:
  rng = np.random.default_rng(case.sentence)
  return np.float32(np.convolve(rng.random(frames + 4), np.ones(5) / 5, 'valid'))


def reading(case: Case, frames: int = FRAMES) -> Reading:
  """What flawless judges would see of a clip."""
  emotion = np.full((frames, 8), -9.0)
  emotion[:, EMOTIONS.index(case.emotion)] = 0
  rng = np.random.default_rng(case.sentence)
  mouth = opening(case, frames)
  return Reading(
    emotion=emotion,
    strength=np.ones(frames),
    opening=mouth,
    jaw=mouth,
    width=mouth,
    identity=np.tile(np.eye(64)[case.identity], (frames, 1)),
    features=rng.normal(size=(frames, 50)),
  )


def truth(case: Case) -> Truth:
  return Truth(
    frames=np.full((FRAMES, 8, 8, 3), NUMBERS[case_name(case)], np.uint8),
    audio=np.zeros(1280 * FRAMES + 640, np.float32),
    opening=opening(case),
    closed=np.arange(FRAMES) == 3,
    box=np.array([0.2, 0.2, 0.8, 0.8]),
    pose=np.zeros((FRAMES, 5)),
  )


class FakeJudges:
  """They recognise a clip by the value of its first pixel."""

  def read(self, frames, box):
    return reading(CASES[frames[0, 0, 0, 0]], len(frames))


class FakePipeline:
  """It draws the truth a little darker, and notes what it was asked for."""

  def __init__(self, breaks_at: int | None = None):
    self.breaks_at = breaks_at
    self.drawn = []

  def reconstruct(self, frames):
    self.drawn.append(int(frames[0, 0, 0, 0]))
    if len(self.drawn) == self.breaks_at:
      raise KeyboardInterrupt
    changed = frames.copy()
    changed[:, 1:] += 16
    return changed


@pytest.fixture
def fakes(monkeypatch):
  """Renders without rendering."""
  monkeypatch.setattr(clips, 'perform_all', lambda cases, *_: map(truth, cases))


def start(folder, pipe=None, **made_with) -> work.Work:
  journal = Journal.open(folder, {'judges': 'abc', **made_with})
  return work.Work(CASES, journal, FakeJudges(), SETTINGS, lambda: pipe)


def test_an_interrupted_row_goes_on_where_it_stopped(fakes, tmp_path):
  start(tmp_path).render()
  first, second = FakePipeline(breaks_at=6), FakePipeline()
  with pytest.raises(KeyboardInterrupt):
    start(tmp_path, first).autoencode()
  start(tmp_path, second).autoencode()
  assert first.drawn[:5] + second.drawn == list(range(len(CASES)))
  start(tmp_path, None).autoencode()  # needs no model: nothing is left


def test_half_a_line_is_a_clip_that_is_not_finished(tmp_path):
  journal = Journal.open(tmp_path, {'seed': 0})
  journal.add('truth', 'a', {'x': np.arange(3)}, right=True)
  with (tmp_path / 'journal.jsonl').open('a') as file:
    file.write('{"row": "truth", "cl')
  again = Journal.open(tmp_path, {'seed': 0})
  assert again.lines == [{'row': 'truth', 'clip': 'a', 'right': True}]
  again.add('truth', 'b', {'x': np.arange(2)})
  lines = (tmp_path / 'journal.jsonl').read_text().splitlines()
  assert [json.loads(line).get('clip') for line in lines] == [None, 'a', 'b']
  np.testing.assert_array_equal(again.arrays('truth', 'a', 'x')['x'], [0, 1, 2])


@pytest.mark.parametrize('name', ['model.unet', 'judges', 'sample.num_steps'])
def test_what_was_made_with_something_else_is_refused(tmp_path, name):
  made_with = {'model.unet': 'a', 'judges': 'b', 'sample.num_steps': 12}
  Journal.open(tmp_path, made_with)
  Journal.open(tmp_path, made_with)
  with pytest.raises(InputError, match=rf'{name}=\S+ \(now 7\).* another --output'):
    Journal.open(tmp_path, made_with | {name: 7})


def test_more_people_may_join_a_table(fakes, tmp_path):
  few = work.Work(
    CASES[:16], Journal.open(tmp_path, {}), FakeJudges(), SETTINGS, lambda: None
  )
  few.render()
  assert len([line for line in few.journal.lines if line['row'] == work.TRUTH]) == 16
  all_of_them = work.Work(
    CASES, Journal.open(tmp_path, {}), FakeJudges(), SETTINGS, lambda: None
  )
  all_of_them.render()
  rows.Scorer(CASES, all_of_them.journal, FakeJudges(), SETTINGS.fps)


def test_nobody_is_recognised_by_the_emotion_that_is_judged():
  references = [reading(case) for case in CASES]
  plain = rows.galleries(CASES, references)
  wrong = np.tile(np.eye(64)[63], (FRAMES, 1))
  poisoned = rows.galleries(
    CASES,
    [
      dataclasses.replace(seen, identity=wrong) if case.emotion == 'sad' else seen
      for case, seen in zip(CASES, references)
    ],
  )
  np.testing.assert_array_equal(poisoned['sad'], plain['sad'])
  assert (poisoned['happy'][:, 63] > 0).all()
  np.testing.assert_allclose(plain['sad'], np.eye(64)[:PEOPLE])


def test_references_say_other_words_than_the_clips_that_are_judged():
  for case, other in zip(CASES, clips.other_words(CASES)):
    assert other.sentence != case.sentence
    assert dataclasses.replace(other, sentence=case.sentence) == case


def test_each_spoilt_row_loses_its_own_score_and_keeps_the_others(fakes, tmp_path):
  table = start(tmp_path)
  table.render()
  scorer = rows.Scorer(CASES, table.journal, FakeJudges(), SETTINGS.fps)
  found = {name: scorer.row(name) for name in (work.TRUTH, *rows.COMPARED)}

  def mean(row, score):
    return found[row].summary[score].mean

  assert mean(work.TRUTH, 'all_right') == 1
  for row, broken in {
    'shuffled audio': 'sync',
    'audio shifted by 3 frames': 'offset_0',
    'wrong emotion': 'emotion',
    'still image': 'sync',
    'other identity': 'identity',
  }.items():
    assert mean(row, 'all_right') == 0, row
    for score in ('emotion', 'sync', 'identity'):
      if score == broken:
        assert mean(row, score) < 0.3, row
      elif found[row].summary[score].clips and broken != 'offset_0':
        assert mean(row, score) > 0.99, (row, score)
  offsets = {score.sync.offset for score in found['audio shifted by 3 frames'].scores}
  assert offsets == {3}
  assert found['wrong emotion'].distance.distance == pytest.approx(
    found[work.TRUTH].distance.distance
  )


def test_the_table_is_written_with_all_its_clips(fakes, tmp_path):
  table = start(tmp_path, FakePipeline())
  table.render()
  table.autoencode()
  scorer = rows.Scorer(CASES, table.journal, FakeJudges(), SETTINGS.fps)
  found = {name: scorer.row(name) for name in (work.TRUTH, work.AUTOENCODED)}
  command.write(tmp_path, found, CASES, table.journal)

  content = json.loads((tmp_path / 'table.json').read_text())
  assert content['made_with'] == {'judges': 'abc'}
  row = content['rows'][work.AUTOENCODED]
  assert len(row['clips']) == len(CASES)
  assert row['summary']['emotion'] == dict(mean=1, low=1, high=1, clips=len(CASES))
  assert row['summary']['psnr']['mean'] == pytest.approx(24.6, abs=0.1)
  assert row['confusion'] == (PEOPLE * np.eye(8, dtype=int)).tolist()
  assert content['rows'][work.TRUTH]['summary']['psnr']['mean'] is None
  lines = (tmp_path / 'table.md').read_text().splitlines()
  assert lines[2].startswith('| truth | 1.00 (1.00, 1.00) |')
  assert 'judges abc' in lines[-1]
  for name in ('confusion.png', 'lip_sync.png', 'sheets/0.png', 'sheets/2.png'):
    assert (tmp_path / name).stat().st_size > 1000


def test_seams_are_looked_for_where_the_last_step_has_its_borders():
  # Windows of the third step begin 2 frames before multiples of 4.
  brightness = np.repeat(np.arange(8) % 2, 4)[2:32]
  frames = np.uint8(90 * brightness)[:, None, None, None] * np.ones((1, 4, 4, 3))
  frames = np.uint8(frames + np.arange(30)[:, None, None, None])
  assert work.seam_of(frames, SETTINGS.sampler) > 50
  other = dataclasses.replace(SETTINGS.sampler, shift=0)
  assert work.seam_of(frames, other) < 0.1
  assert np.isnan(work.seam_of(frames[:5], SETTINGS.sampler))


def test_sampling_settings_are_read_and_checked():
  given = ['sample.num_steps=25', 'sample.g_image=(1.0, 2.0)', 'sample.padding=False']
  assert command.parse_settings(given) == {
    'num_steps': 25,
    'g_image': (1.0, 2.0),
    'padding': False,
  }
  for text, words in {
    'sample.steps=25': 'sample.num_steps',
    'num_steps=25': 'names no sampling setting',
    'sample.num_steps=many': 'cannot be read',
    'sample.num_steps=2.5': 'whole number',
  }.items():
    with pytest.raises(ConfigError, match=words):
      command.parse_settings([text])


def test_rows_are_chosen_by_name_and_the_truth_comes_with_them():
  assert command.chosen_rows(None) == [*rows.ROWS]
  assert command.chosen_rows('generated') == [work.GENERATED, work.TRUTH]
  assert command.chosen_rows('still_image,truth') == [work.TRUTH, 'still image']
  with pytest.raises(ConfigError, match='no row noise; there are: generated, truth'):
    command.chosen_rows('noise')


def test_confusion_counts_what_was_asked_for_downwards(fakes, tmp_path):
  table = start(tmp_path)
  table.render()
  row = rows.Scorer(CASES, table.journal, FakeJudges(), 12.5).row('wrong emotion')
  counts = np.array(report.confusion(row))
  assert counts.sum() == len(CASES)
  assert (counts.sum(1) == PEOPLE).all()
  asked, seen = (EMOTIONS.index(name) for name in ('contempt', 'angry'))
  assert counts[asked, seen] == PEOPLE

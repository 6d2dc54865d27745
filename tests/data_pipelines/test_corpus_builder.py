"""Small trees like the real corpora become data sets, and killed runs resume."""

import concurrent.futures
import csv
import dataclasses
import errno
import json
import pathlib
import shutil
import threading

import numpy as np
import pytest

from data_pipelines import preprocess
from data_pipelines.builders import corpus, corpus_workers
from data_pipelines.builders.corpus_plan import make_plan
from data_pipelines.corpora.clip_file import Skipped
from data_pipelines.preprocess import CorpusConfig
from dicetalk_jax import files
from dicetalk_jax.data import clip_record
from dicetalk_jax.data.autoencoder_loader import frames_loader
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import DataError, InputError
from tests.data_pipelines import made_clips
from tests.data_pipelines.made_clips import RED


def _mead(root: pathlib.Path) -> pathlib.Path:
  """Makes three people for training and one for test.

  One clip is cut off, one has no audio, and one file is not a video.
  """
  for i, person in enumerate(('M003', 'M005', 'W011', 'W014')):
    for j, emotion in enumerate(('angry/level_1', 'sad_level_3')):
      path = root / person / 'video' / 'front' / emotion / '001.mp4'
      made_clips.write(path, 0.6 + 0.04 * i, fps=30, face=(20 + 9 * j, 20))
  whole = made_clips.write(
    root / 'M005/video/front/fear/level_1/002.mp4', 4.0
  ).read_bytes()
  (root / 'M005/video/front/fear/level_1/002.mp4').write_bytes(whole[: len(whole) // 2])
  made_clips.write(root / 'M005/video/front/fear/level_1/003.mp4', sound=False)
  (root / 'W011/video/front/notes.docx').write_text('to do')
  return root


@pytest.fixture(scope='module')
def mead(tmp_path_factory):
  return _mead(tmp_path_factory.mktemp('mead'))


@pytest.fixture(scope='module')
def prepared(mead, tmp_path_factory):
  out = tmp_path_factory.mktemp('out')
  config = CorpusConfig('mead', size=32, min_seconds=0.4, detector=RED)
  return corpus.prepare_corpus(make_plan(config, str(mead)), out, workers=2)


def _forbid(monkeypatch):
  def must_not_run(*args):
    raise AssertionError

  monkeypatch.setattr(preprocess, 'records', must_not_run)


def test_records_of_every_clip_that_can_be_used(prepared):
  folder, _ = prepared
  people, ids = {}, set()
  for split in ('train', 'val', 'test'):
    source = ClipSource(folder, split)
    people[split] = set(source.table.identity)
    ids |= set(source.table.clip_id)
    for clip in source:
      assert clip_record.decode_frames(clip).shape == (clip['num_frames'], 32, 32, 3)
      assert (
        clip_record.DATASETS[clip['dataset']] == 'mead'
        and clip['has_audio']
        and len(clip['bbox']) > 14
      )
    assert (folder / f'clips-{split}.npz').exists()
  assert ids == {
    f'{person}_front_{take}_001'
    for person in ('M003', 'M005', 'W011', 'W014')
    for take in ('angry_1', 'sad_3')
  }
  assert people['test'] == {'mead/M003'}
  assert (
    not people['train'] & people['val']
    and len(people['train']) == 2
    and len(people['val']) == 1
  )
  labels = {
    clip_record.decode_text(clip, 'clip_id'): (
      clip_record.decode_emotion(clip),
      clip['intensity'],
    )
    for clip in ClipSource(folder, 'test')
  }
  assert labels == {
    'M003_front_angry_1_001': ('angry', 1),
    'M003_front_sad_3_001': ('sad', 3),
  }


def test_loaders_read_real_clips_as_synthetic_ones(prepared):
  batch = next(
    iter(frames_loader(DatasetPart(ClipSource(prepared[0])), batch=4, frames=4, seed=0))
  )
  assert batch['video'].shape == (4, 4, 32, 32, 3) and batch['video'].std() > 0.1


def test_the_report_says_what_was_left_out_and_why(prepared):
  folder, report = prepared
  rows = list(csv.DictReader((folder / 'skipped.csv').read_text().splitlines()))
  assert {row['clip']: row['reason'] for row in rows} == {
    'M005_front_fear_1_002': 'file cannot be read',
    'M005_front_fear_1_003': 'no audio',
    'W011/video/front/notes.docx': 'not a video file',
  }
  assert (
    'fear/level_1/002.mp4' in rows[1]['detail']
    or 'fear/level_1/002.mp4' in rows[0]['detail']
  )
  stored = json.loads((folder / 'report.json').read_text())
  assert stored['splits']['test'] == {
    'clips': 2,
    'hours': round(2 * 15 / 25 / 3600, 4),
    'people': 1,
    'emotions': {'angry': 1, 'sad': 1},
    'without_expression': 2,
  }
  assert corpus.Report.load(folder) == report
  assert (
    report.summary().splitlines()[0] == 'train       4 clips      0.00 h     2 people'
  )
  assert '1 x no audio' in report.summary()


def test_a_prepared_corpus_is_found_again(prepared, mead, monkeypatch):
  folder, report = prepared
  _forbid(monkeypatch)
  config = CorpusConfig('mead', size=32, min_seconds=0.4, detector=RED)
  found, again = corpus.prepare_corpus(make_plan(config, str(mead)), folder.parents[2])
  assert found == folder
  assert again.notes[-1].endswith(f'to prepare it again, delete {folder}')
  assert dataclasses.replace(again, notes=again.notes[:-1]) == report
  assert not (folder.parents[2] / 'mead' / 'work').exists() or not list(
    (folder.parents[2] / 'mead' / 'work').iterdir()
  )


def test_a_killed_run_resumes_with_what_is_left(mead, prepared, tmp_path, monkeypatch):
  done = []
  real = preprocess.records

  def dies(clip, *args):
    if len(done) == 3:
      raise KeyboardInterrupt
    done.append(clip.clip_id)
    return real(clip, *args)

  config = CorpusConfig('mead', size=32, min_seconds=0.4, detector=RED)
  monkeypatch.setattr(preprocess, 'records', dies)
  with pytest.raises(KeyboardInterrupt):
    corpus.prepare_corpus(make_plan(config, str(mead)), tmp_path, workers=1)
  assert not list(tmp_path.rglob('dataset_info.json'))
  first = list(done)
  monkeypatch.setattr(
    preprocess,
    'records',
    lambda clip, *args: done.append(clip.clip_id) or real(clip, *args),
  )
  folder, report = corpus.prepare_corpus(
    make_plan(config, str(mead)), tmp_path, workers=1, keep_work=True
  )
  assert len(done) == len(set(done)) == 10 and done[:3] == first  # nothing twice
  assert report == prepared[1]
  # Nor does the result depend on processes or the kill.
  for a, b in zip(ClipSource(folder), ClipSource(prepared[0])):
    assert a['clip_id'] == b['clip_id'] and a['frames'] == b['frames']
    np.testing.assert_array_equal(a['audio'], b['audio'])


def test_every_part_of_the_work_has_a_bar(tmp_path, capsys):
  for name in ('p', 'q', 'r'):
    made_clips.write(tmp_path / 'in' / name / 'a.mp4', 2.0)
  config = CorpusConfig(
    'folder', size=32, min_seconds=0.4, max_seconds=1.0, detector=RED
  )
  corpus.prepare_corpus(make_plan(config, str(tmp_path / 'in')), tmp_path, workers=1)
  bars = capsys.readouterr().err.replace('\r', '\n')
  for part in (
    'folder: 100%',
    'records of train: 100%',
    'records of val: 100%',
    'table of train: 100%',
  ):
    assert part in bars
  # The bar counts pieces, not files.
  assert '4/4' in bars.split('records of train: 100%')[1].splitlines()[0]


def test_leftovers_of_killed_runs_are_removed(tmp_path):
  for name in ('p', 'q'):
    made_clips.write(tmp_path / 'in' / name / 'a.mp4', 0.6)
  plan = make_plan(
    CorpusConfig('folder', size=32, min_seconds=0.4, detector=RED), str(tmp_path / 'in')
  )
  ours, other = (
    tmp_path / 'folder' / name
    for name in (
      f'{plan.name}/incomplete.ABC123_1.0.0',
      'full_64px_0/incomplete.ABC123_1.0.0',
    )
  )
  for folder in (ours, other):
    folder.mkdir(parents=True)
    (folder / 'shard').write_text('half')
  folder, _ = corpus.prepare_corpus(plan, tmp_path, workers=1)
  assert not ours.exists() and other.exists() and folder.exists()


@pytest.mark.parametrize('keep_work', [False, True])
def test_a_second_preparation_waits_for_the_first(tmp_path, monkeypatch, keep_work):
  for name in ('p', 'q'):
    made_clips.write(tmp_path / 'in' / name / 'a.mp4', 0.6)
  config = CorpusConfig('folder', size=32, min_seconds=0.4, detector=RED)
  begun = threading.Event()
  says_so = threading.Event()
  real = preprocess.records
  read = []
  said = []

  def records(clip, *args):
    begun.set()
    assert says_so.wait(timeout=100)
    read.append(clip.clip_id)
    return real(clip, *args)

  def note(text, **kwargs):
    said.append(text)
    says_so.set()

  def prepare_once():
    plan = make_plan(config, str(tmp_path / 'in'))
    return corpus.prepare_corpus(plan, tmp_path, workers=1, keep_work=keep_work)

  monkeypatch.setattr(preprocess, 'records', records)
  monkeypatch.setattr(files, 'print', note, raising=False)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(prepare_once)
    assert begun.wait(timeout=100)
    second = pool.submit(prepare_once)
  folder, report = first.result()
  assert second.result()[0] == folder
  assert second.result()[1].splits == report.splits
  assert sorted(read) == ['p_a', 'q_a']
  assert said == [
    f'another process is preparing folder with these settings in {tmp_path}; waiting '
    'until it ends'
  ]
  assert bool(list((tmp_path / 'folder' / 'work').iterdir())) is keep_work


def test_a_repaired_file_is_read_again_and_all_others_are_kept(tmp_path, monkeypatch):
  for name in ('p', 'q', 'r'):
    made_clips.write(tmp_path / 'in' / name / 'a.mp4', 0.6)
  (tmp_path / 'in/r/a.mp4').write_text('404')
  config = CorpusConfig('folder', size=32, min_seconds=0.4, detector=RED)

  def prepare_once():
    return corpus.prepare_corpus(
      make_plan(config, str(tmp_path / 'in')), tmp_path, workers=1, keep_work=True
    )

  folder, report = prepare_once()
  assert [skip.clip for skip in report.skipped] == ['r_a']
  made_clips.write(tmp_path / 'in/r/a.mp4', 0.6)
  done, real = [], preprocess.records
  monkeypatch.setattr(
    preprocess,
    'records',
    lambda clip, *args: done.append(clip.clip_id) or real(clip, *args),
  )
  # The finished data set without the file is another one.
  repaired, report = prepare_once()
  assert report.skipped == () and done == ['r_a'] and repaired != folder
  np.save(tmp_path / 'in/r/a.npy', np.ones((15, 3)))
  (tmp_path / 'in/labels.csv').write_text(
    'file,expression\np/a.mp4,\nr/a.mp4,r/a.npy\n'
  )
  config = dataclasses.replace(config, expression_columns=(0, 2))
  name = make_plan(config, str(tmp_path / 'in')).name
  np.save(tmp_path / 'in/r/a.npy', np.ones((15, 4)))
  assert make_plan(config, str(tmp_path / 'in')).name != name


def _failing(monkeypatch, errors):
  """Makes the next readings of clips of `q` fail; returns the clips that are read."""
  done, real = [], preprocess.records

  def records(clip, *args):
    done.append(clip.clip_id)
    if clip.clip_id == 'q_a' and errors:
      error = errors.pop()
      if isinstance(error, Exception):
        raise error
      return iter([Skipped(clip.clip_id, 'unexpected error', error)])
    return real(clip, *args)

  monkeypatch.setattr(preprocess, 'records', records)
  return done


def test_temporary_errors_are_tried_again(tmp_path, monkeypatch):
  for name in ('p', 'q', 'r'):
    made_clips.write(tmp_path / 'in' / name / 'a.mp4', 0.6)
  config = CorpusConfig('folder', size=32, min_seconds=0.4, detector=RED)

  def prepare_once():
    return corpus.prepare_corpus(
      make_plan(config, str(tmp_path / 'in')), tmp_path, workers=1, keep_work=True
    )

  done = _failing(monkeypatch, ['timeout', 'timeout'])
  folder, report = prepare_once()
  assert sorted(done) == ['p_a', 'q_a', 'q_a', 'r_a'] and done[-1] == 'q_a'
  assert report.skipped == (Skipped('q_a', 'unexpected error', 'timeout'),)
  assert '1 clips met errors that may be temporary' in report.notes[-1]
  assert sum(part['clips'] for part in report.splits.values()) == 2
  shutil.rmtree(folder)
  done.clear()
  # An error is not an outcome.
  assert prepare_once()[1].skipped == ()
  assert done == ['q_a']
  shutil.rmtree(folder)
  shutil.rmtree(tmp_path / 'folder' / 'work')
  done = _failing(monkeypatch, ['timeout'])
  # An error that happens once is not even reported.
  assert prepare_once()[1].skipped == ()
  assert len(done) == 4


def test_a_full_disk_ends_the_run_in_one_sentence(tmp_path, monkeypatch):
  for name in ('p', 'q'):
    made_clips.write(tmp_path / 'in' / name / 'a.mp4', 0.6)
  plan = make_plan(
    CorpusConfig('folder', size=32, min_seconds=0.4, detector=RED), str(tmp_path / 'in')
  )
  with (
    monkeypatch.context() as patch,
    pytest.raises(InputError, match='no space is left in .*; make room, and resume'),
  ):
    _failing(patch, [OSError(errno.ENOSPC, 'No space left on device')])
    corpus.prepare_corpus(plan, tmp_path, workers=1)
  _, report = corpus.prepare_corpus(plan, tmp_path, workers=1)
  assert report.skipped == ()


def test_a_clip_that_ends_its_process_is_left_out(tmp_path):
  for i in range(5):
    made_clips.write(
      tmp_path / 'in' / f'p{i}' / 'a.mp4', 0.6, face=(0 if i == 2 else 30, 20)
    )
  config = CorpusConfig(
    'folder',
    size=32,
    min_seconds=0.4,
    detector='tests.data_pipelines.made_clips:deadly',
  )
  _, report = corpus.prepare_corpus(
    make_plan(config, str(tmp_path / 'in')), tmp_path / 'out', workers=2
  )
  assert sum(part['clips'] for part in report.splits.values()) == 4
  assert [(skip.clip, skip.reason) for skip in report.skipped] == [
    ('p2_a', 'the process that read it died')
  ]


def test_the_last_clip_may_end_its_process_too(tmp_path):
  for i in range(3):
    made_clips.write(tmp_path / 'in' / f'p{i}' / 'a.mp4', 0.6)
  config = CorpusConfig(
    'folder',
    size=32,
    min_seconds=0.4,
    detector='tests.data_pipelines.made_clips:deadly',
  )
  corpus.prepare_corpus(
    make_plan(config, str(tmp_path / 'in')), tmp_path / 'out', workers=1, keep_work=True
  )
  made_clips.write(tmp_path / 'in' / 'q' / 'a.mp4', 0.6, face=(0, 20))
  _, report = corpus.prepare_corpus(
    make_plan(config, str(tmp_path / 'in')), tmp_path / 'out', workers=2
  )
  assert [(skip.clip, skip.reason) for skip in report.skipped] == [
    ('q_a', 'the process that read it died')
  ]


def test_a_split_whose_clips_are_all_left_out_is_drawn_again(tmp_path, monkeypatch):
  for i in range(4):
    made_clips.write(tmp_path / 'in' / f'p{i}' / 'a.mp4', 0.6)
  config = CorpusConfig('folder', size=32, min_seconds=0.4, detector=RED)
  (bad,) = make_plan(config, str(tmp_path / 'in')).clips['val']
  (tmp_path / 'in' / bad.video).write_text('404')
  plan = make_plan(config, str(tmp_path / 'in'))
  folder, report = corpus.prepare_corpus(plan, tmp_path / 'a', workers=1)
  people = {
    split: set(ClipSource(folder, split).table.identity) for split in report.splits
  }
  assert people.keys() == {'train', 'val'} and not people['train'] & people['val']
  assert people['train'] | people['val'] == {
    f'folder/p{i}' for i in range(4) if f'folder/p{i}' != bad.identity
  }
  assert report.notes == (
    'all clips of the split val were left out, so the splits were drawn again among '
    'the others',
  )
  assert corpus.prepare_corpus(plan, tmp_path / 'a')[0] == folder  # found again

  # With Beam the same clips go to the pipeline that writes. Beam itself is not
  # installed next to this project.
  pipelines = []
  monkeypatch.setattr(
    corpus,
    '_beam_config',
    lambda *args: {'beam_runner': 'a runner', 'beam_options': None},
  )
  monkeypatch.setattr(
    corpus,
    '_prepare_in_beam',
    lambda worker, clips, beam_runner, beam_options: corpus_workers.prepare_clips(
      worker, clips, processes=1
    ),
  )
  monkeypatch.setattr(
    corpus.tfds_writer,
    'write',
    lambda builder, splits, **config: pipelines.append(
      (
        {
          split: [
            corpus._read_clip(line)
            for line in pathlib.Path(path).read_text().splitlines()
          ]
          for split, path in builder.manifests.items()
        },
        builder.data_path.mkdir(parents=True),
      )
    ),
  )
  _, with_beam = corpus.prepare_corpus(plan, tmp_path / 'b', beam_runner='a runner')
  assert {
    split: {clip.identity for clip in clips} for split, clips in pipelines[0][0].items()
  } == people
  assert with_beam == report
  for path in (tmp_path / 'in').rglob('*.mp4'):
    path.write_text('404')
  with pytest.raises(DataError, match='could be prepared for training'):
    corpus.prepare_corpus(
      make_plan(config, str(tmp_path / 'in')), tmp_path / 'c', beam_runner='a runner'
    )
  assert len(pipelines) == 1


def test_a_split_that_the_others_cannot_make_is_missed_in_one_sentence(tmp_path):
  for i in range(2):
    made_clips.write(tmp_path / 'in' / f'p{i}' / 'a.mp4', 0.6)
  config = CorpusConfig('folder', size=32, min_seconds=0.4, detector=RED)
  for split in ('train', 'val'):
    plan = make_plan(config, str(tmp_path / 'in'))
    (bad,) = plan.clips[split]
    whole = (tmp_path / 'in' / bad.video).read_bytes()
    (tmp_path / 'in' / bad.video).write_text('404')
    plan = make_plan(config, str(tmp_path / 'in'))
    folder, report = corpus.prepare_corpus(plan, tmp_path, workers=1)
    (tmp_path / 'in' / bad.video).write_bytes(whole)
    assert set(report.splits) == {'train'} and len(ClipSource(folder)) == 1
    assert report.notes[-1] == (
      'the people that are left do not make the split val; add people'
    )

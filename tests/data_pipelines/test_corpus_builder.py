"""Small trees like the real corpora become data sets: resumed, reported, with
disjoint splits.
"""

import contextlib
import csv
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import shutil

from etils.epath import gpath
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import numpy as np
import pytest

from data_pipelines import prepare, preprocess
from data_pipelines.builders import corpus, corpus_workers
from data_pipelines.builders.corpus_plan import make_plan
from data_pipelines.corpora.clip_file import Skipped
from data_pipelines.preprocess import CorpusConfig
from dicetalk_jax.data import clip_record, loader
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.errors import DataError, InputError, one_sentence
from tests.data_pipelines import made_clips

RED = 'tests.data_pipelines.made_clips:red'
FLAGS = ['--size=32', '--min_seconds=.4', f'--detector={RED}', '--workers=1']


def _mead(root: pathlib.Path) -> pathlib.Path:
  """Three people for training and one for test; one clip is cut off, one has no
  sound, one is no video.
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


@contextlib.contextmanager
def _opened(path):
  handle = os.open(path, os.O_RDONLY)
  try:
    yield handle
  finally:
    os.close(handle)


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
    iter(
      loader.frames_loader(
        loader.Part(ClipSource(prepared[0])), batch=4, frames=4, seed=0
      )
    )
  )
  assert batch['video'].shape == (4, 4, 32, 32, 3) and batch['video'].std() > 0.1


def test_the_report_says_what_was_left_out_and_why(prepared):
  folder, report = prepared
  rows = list(csv.DictReader((folder / 'skipped.csv').read_text().splitlines()))
  assert {row['clip']: row['reason'] for row in rows} == {
    'M005_front_fear_1_002': 'file cannot be read',
    'M005_front_fear_1_003': 'no sound',
    'W011/video/front/notes.docx': 'no video file',
  }
  assert (
    'fear/level_1/002.mp4' in rows[1]['detail']
    or 'fear/level_1/002.mp4' in rows[0]['detail']
  )
  told = json.loads((folder / 'report.json').read_text())
  assert told['splits']['test'] == {
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
  assert '1 x no sound' in report.summary()


def test_a_prepared_corpus_is_found_again(prepared, mead, monkeypatch):
  folder, report = prepared
  _forbid(monkeypatch)
  config = CorpusConfig('mead', size=32, min_seconds=0.4, detector=RED)
  found, told = corpus.prepare_corpus(make_plan(config, str(mead)), folder.parents[2])
  assert found == folder and told.notes[-1].endswith(
    f'to prepare it anew, delete {folder}'
  )
  assert dataclasses.replace(told, notes=told.notes[:-1]) == report
  assert not (folder.parents[2] / 'mead' / 'work').exists() or not list(
    (folder.parents[2] / 'mead' / 'work').iterdir()
  )


def test_a_killed_run_goes_on_with_what_is_left(mead, prepared, tmp_path, monkeypatch):
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
  for a, b in zip(
    ClipSource(folder), ClipSource(prepared[0])
  ):  # nor does it depend on processes or the kill
    assert a['clip_id'] == b['clip_id'] and a['frames'] == b['frames']
    np.testing.assert_array_equal(a['audio'], b['audio'])


def test_bars_tell_of_every_part_of_the_work(tmp_path, capsys):
  for name in ('p', 'q', 'r'):
    made_clips.write(tmp_path / 'in' / name / 'a.mp4', 2.0)
  config = CorpusConfig(
    'folder', size=32, min_seconds=0.4, max_seconds=1.0, detector=RED
  )
  corpus.prepare_corpus(make_plan(config, str(tmp_path / 'in')), tmp_path, workers=1)
  told = capsys.readouterr().err.replace('\r', '\n')
  for part in (
    'folder: 100%',
    'records of train: 100%',
    'records of val: 100%',
    'table of train: 100%',
  ):
    assert part in told
  assert (
    '4/4' in told.split('records of train: 100%')[1].splitlines()[0]
  )  # pieces, not files


def test_leftovers_of_killed_runs_go_unless_somebody_works_there(tmp_path):
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
  with _opened(tmp_path / 'folder') as handle:
    fcntl.flock(handle, fcntl.LOCK_SH)  # as another run does
    folder, _ = corpus.prepare_corpus(plan, tmp_path, workers=1)
    assert ours.exists()
  shutil.rmtree(folder)
  corpus.prepare_corpus(plan, tmp_path, workers=1)
  assert not ours.exists() and other.exists() and folder.exists()


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
  repaired, report = (
    prepare_once()
  )  # the finished set without it is not taken for this one
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
  """Lets the next readings of clips of `q` fail; returns the list of all clips that
  are read.
  """
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


def test_errors_that_may_pass_are_tried_again(tmp_path, monkeypatch):
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
  assert '1 clips met errors that may pass' in report.notes[-1]
  assert sum(part['clips'] for part in report.splits.values()) == 2
  shutil.rmtree(folder)
  done.clear()
  assert prepare_once()[1].skipped == () and done == [
    'q_a'
  ]  # what was an error is no outcome
  shutil.rmtree(folder)
  shutil.rmtree(tmp_path / 'folder' / 'work')
  done = _failing(monkeypatch, ['timeout'])
  assert prepare_once()[1].skipped == () and len(done) == 4  # a hitch is not even seen


def test_a_full_disk_ends_the_run_in_one_sentence(tmp_path, monkeypatch):
  for name in ('p', 'q'):
    made_clips.write(tmp_path / 'in' / name / 'a.mp4', 0.6)
  plan = make_plan(
    CorpusConfig('folder', size=32, min_seconds=0.4, detector=RED), str(tmp_path / 'in')
  )
  with (
    monkeypatch.context() as patch,
    pytest.raises(InputError, match='no room left in .*; make room, and the same'),
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


def test_a_split_whose_clips_are_all_left_out_is_none(tmp_path, monkeypatch):
  for i in range(4):
    made_clips.write(tmp_path / 'in' / f'p{i}' / 'a.mp4', 0.6)
  config = CorpusConfig('folder', size=32, min_seconds=0.4, detector=RED)
  (bad,) = make_plan(config, str(tmp_path / 'in')).clips['val']
  (tmp_path / 'in' / bad.video).write_text('404')
  plan = make_plan(config, str(tmp_path / 'in'))
  folder, report = corpus.prepare_corpus(plan, tmp_path / 'a', workers=1)
  assert set(report.splits) == {'train'} and len(ClipSource(folder)) == 3

  # With Beam the same clips go to the pipeline that writes. Beam itself is not
  # installed beside this project.
  pipelines = []
  monkeypatch.setattr(
    corpus,
    '_beam_config',
    lambda *args: {'beam_runner': 'a runner', 'beam_options': None},
  )
  monkeypatch.setattr(
    corpus,
    '_run_in_beam',
    lambda worker, clips, beam_runner, beam_options: corpus_workers.run(
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
  _, told = corpus.prepare_corpus(plan, tmp_path / 'b', beam_runner='a runner')
  assert pipelines[0][0] == {'train': plan.clips['train']} and told == report
  for path in (tmp_path / 'in').rglob('*.mp4'):
    path.write_text('404')
  with pytest.raises(DataError, match='could be prepared for training'):
    corpus.prepare_corpus(
      make_plan(config, str(tmp_path / 'in')), tmp_path / 'c', beam_runner='a runner'
    )
  assert len(pipelines) == 1


def test_hdtf_and_voxceleb2_by_command(tmp_path, capsys):
  hdtf, vox = tmp_path / 'hdtf', tmp_path / 'vox'
  made_clips.write(hdtf / 'WDA_Ada0.mp4', 3.0, fps=24, step=0.2)
  made_clips.write(hdtf / 'WRA_Bob.mp4', 2.0, step=0.2)
  (hdtf / 'WDA_annotion_time.txt').write_text(
    'Ada0.mp4 00:00-00:01 00:01-00:03 \nEve.mp4 00:01-00:02\n'
  )
  (hdtf / 'WRA_annotion_time.txt').write_text('Bob.mp4 00:00-00:02\n')
  (hdtf / 'WDA_crop_wh.txt').write_text('Ada0_1.mp4 40 120 20 120\n')
  (hdtf / 'WDA_resolution.txt').write_text('Ada0.mp4 144\n')
  prepare.main(
    ['hdtf', f'--root={hdtf}', f'--out={tmp_path}', '--content=embedder', *FLAGS]
  )
  lines = capsys.readouterr().out.splitlines()
  folder = pathlib.Path(lines[-1])
  assert (
    'WDA lists 0 URLs, 2 annotated videos, 3 clips, 1 with a crop box, 0.00 h'
    in ''.join(lines)
  )
  assert 'left out: 1 x video missing' in lines
  clips = {
    clip_record.decode_text(clip, 'clip_id'): clip
    for split in ('train', 'val')
    for clip in ClipSource(folder, split)
  }
  lengths = {key: int(clip['num_frames']) for key, clip in clips.items()}
  assert lengths == {'WDA_Ada0_0': 25, 'WDA_Ada0_1': 50, 'WRA_Bob_0': 50}
  assert not clips['WDA_Ada0_0']['has_video'] and 'frames' not in clips['WDA_Ada0_0']

  for part, person in (('dev', 'id00001'), ('dev', 'id00002'), ('test', 'id00003')):
    made_clips.write(vox / part / 'mp4' / person / 'x' / '00001.mp4', 1.0, side=14)
  prepare.main(['voxceleb2', f'--root={vox}', f'--out={tmp_path}', *FLAGS])
  folder = pathlib.Path(capsys.readouterr().out.splitlines()[-1])
  assert [len(ClipSource(folder, split)) for split in ('train', 'val', 'test')] == [
    1,
    1,
    1,
  ]
  assert (
    clip_record.decode_text(ClipSource(folder, 'test')[0], 'identity') == 'vox2/id00003'
  )


def test_a_folder_with_labels_by_command(tmp_path, capsys):
  root = tmp_path / 'mine'
  for name in ('a', 'b', 'c'):
    made_clips.write(root / f'{name}.mp4', 1.0)
  np.save(root / 'a.npy', np.random.default_rng(0).normal(size=(26, 7)))
  (root / 'labels.csv').write_text(
    'file,identity,emotion,intensity,split,expression\na.mp4,anna,happy,3,train,a.npy\nb.mp4,anna,sad,1,val,\n'
  )
  command = [
    'folder',
    f'--root={root}',
    f'--out={tmp_path}',
    '--expression_columns=1:6',
    *FLAGS,
  ]
  prepare.main([*command, '--dry_run'])
  assert capsys.readouterr().out.splitlines() == [
    'train       1 clips     1 people',
    'val         1 clips     1 people',
    'left out: 1 x not in the labels',
    'note: 1 of 2 clips have no expression features',
    'note: 1 people are in more than one split: folder/anna',
  ]
  assert not (tmp_path / 'folder').exists()
  prepare.main(command)
  folder = pathlib.Path(capsys.readouterr().out.splitlines()[-1])
  anna = ClipSource(folder)[0]
  assert anna['expression'].shape == (25, 5) and anna['motion_exp'] > 0.5
  assert (clip_record.decode_emotion(anna), anna['intensity']) == ('happy', 3)
  assert len(ClipSource(folder, 'val')[0]['expression']) == 0


@pytest.mark.parametrize(
  ('make', 'flags', 'sentence'),
  [
    (lambda root: None, ['mead', '--root={root}/none'], 'is no folder; check the path'),
    (
      lambda root: None,
      ['mead', '--root={root}'],
      'no clip of mead was found in {root}; expected <ID>/video/',
    ),
    (
      lambda root: made_clips.touch(root, 'a/b.mp4', 'c.zip'),
      ['mead', '--root={root}'],
      'of 2 passed over, the first is a/b.mp4 (path not understood)',
    ),
    (
      lambda root: made_clips.touch(root, 'M003/sad/level_1/001.mp4'),
      ['mead', '--root={root}'],
      'belong to test, none to training; add other people',
    ),
    (
      lambda root: made_clips.touch(root, 'p/a.mp4', 'q/a.mp4'),
      ['folder', '--root={root}', *FLAGS],
      'could be prepared for training (2 x file cannot be read); see ',
    ),
    (
      lambda root: made_clips.touch(root, 'p/a.mp4', 'q/a.mp4', 'coeff/x.npy'),
      ['folder', '--root={root}', '--expression={root}/coeff'],
      'holds features of none of the 2 clips',
    ),
    (
      lambda root: None,
      ['hdtf', '--root={root}'],
      'holds none of RD_annotion_time.txt',
    ),
    (
      lambda root: None,
      ['mead', '--root={root}', '--views=behind'],
      '--views=behind: behind is not known; choose',
    ),
    (
      lambda root: None,
      ['mead', '--root={root}', '--size=0'],
      'size=0 cannot be prepared; choose 16 to 2048',
    ),
    (
      lambda root: made_clips.touch(root, 'p/a.mp4', 'q/a.mp4'),
      ['folder', '--root={root}', '--beam_runner=DirectRunner'],
      'pip install -r requirements/beam.txt',
    ),
  ],
)
def test_mistakes_end_with_one_sentence(make, flags, sentence, tmp_path, capsys):
  root = tmp_path / 'root'
  root.mkdir()
  make(root)
  with pytest.raises(SystemExit) as end, one_sentence():
    prepare.main([flag.format(root=root) for flag in flags] + [f'--out={tmp_path}'])
  assert end.value.code == 2
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith('error: ') and sentence.format(root=root) in line
  assert not list(tmp_path.rglob('dataset_info.json'))


def test_names_of_data_sets_say_what_is_in_them(tmp_path):
  made_clips.touch(tmp_path, 'p/a.mp4', 'q/a.mp4')
  name = make_plan(CorpusConfig('folder'), str(tmp_path)).name
  assert (
    name.startswith('full_512px_')
    and make_plan(CorpusConfig('folder'), str(tmp_path)).name == name
  )
  assert make_plan(CorpusConfig('folder', expand=1.0), str(tmp_path)).name != name
  made_clips.touch(tmp_path, 'r/a.mp4')
  assert make_plan(CorpusConfig('folder'), str(tmp_path)).name != name


def test_doubles_are_left_out(tmp_path):
  made_clips.touch(tmp_path, 'p/a.mp4', 'p/a.mkv', 'q/b.mp4')
  plan = make_plan(CorpusConfig('folder'), str(tmp_path))
  assert plan.skipped == (Skipped('p/a.mp4', 'the same clip twice', 'p/a.mkv'),)


def test_clips_whose_ids_would_be_equal_all_survive(tmp_path):
  for path in ('a/b_c.mp4', 'a_b/c.mp4', 'x.mp4', 'x_p00.mp4', 'y_p00.mp4'):
    made_clips.write(tmp_path / 'in' / path, 2.0 if path == 'x.mp4' else 0.6)
  config = CorpusConfig(
    'folder', size=32, min_seconds=0.4, max_seconds=1.0, detector=RED
  )
  plan = make_plan(config, str(tmp_path / 'in'))
  ids = {clip.video: clip.clip_id for clips in plan.clips.values() for clip in clips}
  assert ids['x.mp4'] == 'x' and ids['y_p00.mp4'] == 'y_p00' and not plan.skipped
  for path, start in (
    ('a/b_c.mp4', 'a_b_c_'),
    ('a_b/c.mp4', 'a_b_c_'),
    ('x_p00.mp4', 'x_p00_'),
  ):
    assert ids[path].startswith(start) and len(ids[path]) == len(start) + 8
  folder, report = corpus.prepare_corpus(plan, tmp_path, workers=1)
  made = {
    clip for split in report.splits for clip in ClipSource(folder, split).table.clip_id
  }
  assert made == {*ids.values(), 'x_p00', 'x_p01'} - {'x'} and not report.skipped
  (tmp_path / 'in/labels.csv').write_text(
    'file\n' + '\n'.join(sorted(ids, reverse=True))
  )
  again = make_plan(config, str(tmp_path / 'in'))  # in another order
  assert {
    clip.video: clip.clip_id for clips in again.clips.values() for clip in clips
  } == ids


class _Bucket(MemoryFileSystem):
  """An object store for `s3://`, in memory."""

  protocol = 's3'
  store, pseudo_dirs = {}, ['']

  @classmethod
  def _strip_protocol(cls, path):
    path = path.removeprefix('s3://').strip('/')
    return path and f'/{path}'


def test_corpus_and_data_set_may_lie_in_a_bucket(tmp_path, monkeypatch, capsys):
  fsspec.register_implementation('s3', _Bucket, clobber=True)
  monkeypatch.setattr(
    gpath, '_is_tf_installed', lambda: False
  )  # or else TensorFlow's own file systems serve
  bucket = fsspec.filesystem('s3')
  for name in ('p', 'q'):
    bucket.pipe_file(
      f'mine/in/{name}/a.mp4', made_clips.write(tmp_path / 'a.mp4', 0.6).read_bytes()
    )
  prepare.main(['folder', '--root=s3://mine/in', '--out=s3://mine/out', *FLAGS])
  folder = capsys.readouterr().out.splitlines()[-1]
  assert folder.startswith('s3://mine/out/folder/full_32px_')
  bucket.get(f'{folder}/', f'{tmp_path}/copy/', recursive=True)
  (train,) = ClipSource(tmp_path / 'copy')
  assert clip_record.decode_frames(train).shape == (15, 32, 32, 3)
  assert not [path for path in bucket.find('mine/out') if 'work' in path]


def test_what_is_done_is_found_without_a_question_per_clip(tmp_path, monkeypatch):
  fsspec.register_implementation('s3', _Bucket, clobber=True)
  bucket, asked = fsspec.filesystem('s3'), []
  people = [f'p{i}' for i in range(20)]
  for name in people:
    bucket.pipe_file(f'found/in/{name}/a.mp4', b'404')
  plan = make_plan(
    CorpusConfig('folder', size=32, min_seconds=0.4, detector=RED), 's3://found/in'
  )
  worker = corpus_workers.Worker(
    plan.config, plan.tree, plan.expressions, corpus.ClipCache('s3://found/work')
  )
  for name in ('info', 'cat_file', 'ls'):
    real = getattr(_Bucket, name)
    monkeypatch.setattr(
      _Bucket,
      name,
      lambda self, path, *args, _real=real, _name=name, **kwargs: (
        asked.append((_name, path)),
        _real(self, path, *args, **kwargs),
      )[1],
    )
  dict(corpus._work(worker, plan, lambda worker, clips: iter(())))
  assert len(asked) < 5  # one listing of a folder that is empty

  def run(worker, clips):
    return corpus_workers.run(worker, clips, 1)

  made = dict(corpus._work(worker, plan, run))
  assert len(made) == 20
  asked.clear()

  def none(worker, clips):
    return iter(()) if not clips else pytest.fail('all are done')

  assert dict(corpus._work(worker, plan, none)) == made
  read = [path for name, path in asked if name == 'cat_file']
  assert len(read) == len(set(read)) == 20 and not [
    path for _, path in asked if 'found/in' in path
  ]

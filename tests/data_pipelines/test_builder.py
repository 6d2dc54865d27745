"""The synthetic data set: disjoint splits, the same records on any number of cores,
whole or not at all.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from data_pipelines import prepare
from data_pipelines.builders import synthetic_clips
from data_pipelines.builders.synthetic import prepare_synthetic
from data_pipelines.builders.synthetic_clips import SyntheticConfig
from data_pipelines.synthetic import phonemes
from data_pipelines.synthetic.clip import make_clip
from dicetalk_jax import files
from dicetalk_jax.data import clip_record
from dicetalk_jax.data.autoencoder_loader import frames_loader
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError, InputError, one_sentence

TINY = SyntheticConfig(size=32, train=2, val=1, test=1, clips=3, seconds=0.4)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return prepare_synthetic(tmp_path_factory.mktemp('data'), TINY, workers=2)


def test_splits_share_neither_people_nor_sentences():
  config = SyntheticConfig(train=12, val=6, test=6, clips=8)
  people, sentences = {}, {}
  for split in config.splits:
    jobs = synthetic_clips.jobs(config, split)
    people[split] = {job.identity for job in jobs}
    sentences[split] = {phonemes.sentence(job.sentence()) for job in jobs}
    assert len(jobs) == len({job.key for job in jobs}) == 8 * len(people[split])
  for values in (people, sentences):
    assert not values['train'] & values['val'] and not values['train'] & values['test']
    assert not values['val'] & values['test']
  larger = {
    job.key
    for job in synthetic_clips.jobs(dataclasses.replace(config, train=20), 'val')
  }
  assert larger == {job.key for job in synthetic_clips.jobs(config, 'val')}


def test_clips_cycle_through_emotions_and_levels():
  jobs = synthetic_clips.jobs(SyntheticConfig(train=1, clips=24), 'train')
  counts = collections.Counter(
    clip_record.emotion_class(job.emotion, job.level) for job in jobs
  )
  assert counts == {0: 3} | dict.fromkeys(range(1, 22), 1)
  assert {
    job.level
    for job in synthetic_clips.jobs(SyntheticConfig(levels=(3,)), 'train')
    if job.emotion != 'neutral'
  } == {3}


def test_speech_lasts_two_seconds_however_fast():
  jobs = [
    job
    for job in synthetic_clips.jobs(
      SyntheticConfig(train=4, content='embedder'), 'train'
    )
    if job.emotion == 'fear' and job.level == 3
  ]
  for job in jobs:
    _, clip = synthetic_clips.render(job)
    assert 50 <= clip['num_frames'] <= 60


def test_records_are_the_clips(folder):
  source = ClipSource(folder, 'val')
  assert len(source) == 3
  jobs = {job.key: job for job in synthetic_clips.jobs(TINY, 'val')}
  for clip in source:
    job = jobs.pop(clip_record.decode_text(clip, 'clip_id'))
    truth = make_clip(
      job.identity,
      job.emotion,
      job.level,
      job.sentence(),
      size=32,
      take=job.take,
      max_seconds=0.4,
    )
    frames = clip_record.decode_frames(clip)
    assert frames.shape == (10, 32, 32, 3)
    assert np.abs(frames.astype(float) - truth.frames).mean() < 3
    assert clip_record.decode_text(clip, 'text') == truth.text
    assert (
      clip_record.decode_emotion(clip) == job.emotion and clip['intensity'] == job.level
    )
    assert clip_record.decode_text(clip, 'identity') == f'synthetic/{job.identity:08d}'
    assert np.abs(clip_record.decode_audio(clip) - truth.audio).max() < 1e-4
    for name in ('expression', 'bbox', 'opening', 'landmarks', 'phoneme'):
      np.testing.assert_allclose(clip[name], getattr(truth, name), rtol=1e-6)
    assert (
      clip['has_video']
      and clip['has_audio']
      and clip['has_expression']
      and not clip['has_prior']
    )
    assert clip['motion_exp'] > 0
  assert not jobs


def test_records_do_not_depend_on_the_number_of_processes(folder, tmp_path):
  alone = prepare_synthetic(tmp_path, TINY, workers=1)
  files = sorted(path.name for path in folder.iterdir())
  assert sorted(path.name for path in alone.iterdir()) == files
  assert sum('array_record' in name for name in files) == 3
  for name in files:
    assert (alone / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_prepared_data_set_is_found_again(folder, monkeypatch):
  def must_not_run(job):
    raise AssertionError

  monkeypatch.setattr(synthetic_clips, 'render', must_not_run)
  again = dataclasses.replace(TINY, motion=1)
  assert prepare_synthetic(folder.parents[2], again, workers=1) == folder
  assert dataclasses.replace(TINY, seed=1).name != TINY.name


def test_an_interrupted_data_set_does_not_appear(tmp_path, monkeypatch):
  render, count = synthetic_clips.render, itertools.count()

  def breaks(job):
    if next(count) == 7:  # in the second split
      raise KeyboardInterrupt
    return render(job)

  monkeypatch.setattr(synthetic_clips, 'render', breaks)
  with pytest.raises(KeyboardInterrupt):
    prepare_synthetic(tmp_path, TINY, workers=1)
  assert not list(tmp_path.rglob('dataset_info.json'))
  assert len(ClipSource(prepare_synthetic(tmp_path, TINY, workers=1), 'test')) == 3


def test_a_source_knows_its_clips(folder):
  source = pickle.loads(pickle.dumps(ClipSource(folder, 'train')))
  table = source.table
  assert len(table) == len(source) == 6
  assert collections.Counter(table.identity) == {
    'synthetic/00000000': 3,
    'synthetic/00000001': 3,
  }
  assert (
    set(table.emotion) == set(clip_record.EMOTIONS[:3])
    and (table.num_frames == 10).all()
  )
  assert [clip_record.decode_text(clip, 'clip_id') for clip in source] == list(
    table.clip_id
  )
  assert (folder / 'clips-train.npz').exists()
  val = ClipSource(folder, 'val')
  assert val.fingerprint != source.fingerprint == ClipSource(folder).fingerprint
  assert val.motion_medians == source.motion_medians  # training clips set the unit
  with pytest.raises(DataError, match="no split 'dev'"):
    ClipSource(folder, 'dev')
  with pytest.raises(DataError, match='no prepared data set'):
    ClipSource(folder.parent)


def test_loaders_read_the_files(folder):
  batch = next(
    iter(frames_loader(DatasetPart(ClipSource(folder)), batch=6, frames=4, seed=0))
  )
  assert batch['video'].shape == (6, 4, 32, 32, 3)
  assert batch['video'].std(axis=(1, 2, 3, 4)).min() > 0.05  # images, not blanks
  assert len(np.unique(batch['video'][:, 0].mean(axis=(1, 2, 3)))) == 6


def test_without_pixels(tmp_path):
  config = dataclasses.replace(TINY, content='embedder', train=1, val=0, test=0)
  source = ClipSource(prepare_synthetic(tmp_path, config, workers=1))
  assert (
    source[0]['expression'].shape == (10, 64)
    and 'frames' not in source[0]
    and 'latents' not in source[0]
  )
  with pytest.raises(DataError, match='no pixels'):
    frames_loader(DatasetPart(source), batch=1, frames=2, seed=0)


@pytest.mark.parametrize(
  ('flags', 'sentence'),
  (
    (['--size=8'], 'size=8 cannot be generated; choose 16 to 1024'),
    (['--seconds=0'], 'seconds=0.0 cannot be generated'),
    (['--levels=1,5'], 'levels=(1, 5) cannot be generated'),
    (['--clips=many'], "argument --clips: invalid int value: 'many'"),
    (['--workers=0'], '--workers must be at least 1, got 0'),
    (['--content=all'], 'invalid choice'),
    (['--frobnicate=1'], 'unrecognized arguments: --frobnicate=1'),
  ),
)
def test_bad_flags_end_with_one_sentence(flags, sentence, tmp_path, capsys):
  with pytest.raises(SystemExit) as end, one_sentence():
    prepare.main(['synthetic', f'--data_dir={tmp_path}', *flags])
  assert end.value.code == 2
  line = capsys.readouterr().err
  assert line.startswith('error: ') and line.count('\n') == 1 and sentence in line
  assert not list(tmp_path.iterdir())


def test_the_command_prints_the_folder(folder, capsys):
  with pytest.raises(ConfigError, match='--data_dir'):
    prepare.main(['synthetic'])
  flags = ['--size=32', '--train=2', '--val=1', '--test=1', '--clips=3', '--seconds=.4']
  prepare.main(['synthetic', f'--data_dir={folder.parents[2]}', *flags])
  assert capsys.readouterr().out.strip() == str(folder)


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(InputError, match='cannot be made'):
    prepare_synthetic(tmp_path / 'file' / 'data', TINY)


def test_rendering_processes_do_not_load_heavy_libraries():
  code = (
    'import sys, data_pipelines.builders.synthetic_clips\n'
    'print(sorted(set(sys.modules) & set(sys.argv)))'
  )
  heavy = ['jax', 'tensorflow', 'tensorflow_datasets', 'torch']
  assert (
    subprocess.run(
      [sys.executable, '-c', code, *heavy], capture_output=True, text=True
    ).stdout
    == '[]\n'
  )


def test_a_second_preparation_waits_for_the_first(tmp_path, monkeypatch):
  config = dataclasses.replace(TINY, train=1, clips=1, content='embedder')
  begun = threading.Event()
  says_so = threading.Event()
  real = synthetic_clips.render
  rendered = []

  def render(job):
    begun.set()
    assert says_so.wait(timeout=100)
    rendered.append(job.key)
    return real(job)

  monkeypatch.setattr(synthetic_clips, 'render', render)
  monkeypatch.setattr(
    files, 'print', lambda *args, **kwargs: says_so.set(), raising=False
  )
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(prepare_synthetic, tmp_path, config, workers=1)
    assert begun.wait(timeout=100)
    second = pool.submit(prepare_synthetic, tmp_path, config, workers=1)
  assert first.result() == second.result()
  assert len(rendered) == len(set(rendered)) == 3
  assert len(ClipSource(second.result(), 'train')) == 1

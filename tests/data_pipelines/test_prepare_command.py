"""`python -m data_pipelines.prepare` on small trees like the real corpora."""

import os
import pathlib
import shutil

import numpy as np
import pytest
import soundfile

from data_pipelines import prepare
from dicetalk_jax.data import clip_record
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.errors import Note, one_sentence
from dicetalk_jax.media import video_reader
from tests.data_pipelines import made_clips
from tests.data_pipelines.made_clips import FLAGS

FIELD_INPUTS = pathlib.Path(__file__).parents[1] / 'field_inputs'
QUARTER = 'tests.data_pipelines.test_prepare_command:quarter'


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
  test = ClipSource(folder, 'test')
  assert clip_record.decode_text(test[0], 'identity') == 'vox2/id00003'
  assert list(test.youtube_ids) == ['x']


def quarter():
  """Makes a detector whose face is the quarter in the middle, for --detector."""
  return lambda image: (
    image.shape[1] / 4,
    image.shape[0] / 4,
    image.shape[1] / 2,
    image.shape[0] / 2,
  )


def test_squeezed_pixels_opposite_channels_and_labels_of_windows(tmp_path, capsys):
  root = tmp_path / 'mine'
  (root / 'anna').mkdir(parents=True)
  shutil.copy(FIELD_INPUTS / 'anamorphic.mp4', root / 'anna' / 'a1.mp4')
  shutil.copy(FIELD_INPUTS / 'antiphase.wav', root / 'a1.wav')
  (root / 'labels.csv').write_bytes(
    'file\temotion\taudio\tend\ranna/a1.mp4\thappy\ta1.wav\t1.2\r'.encode('utf-16')
  )
  flags = ['--size=64', '--min_seconds=1', '--expand=0.5', '--workers=1']
  with pytest.warns(Note, match='cancel each other out'):
    prepare.main(
      ['folder', f'--root={root}', f'--out={tmp_path}', f'--detector={QUARTER}', *flags]
    )
  folder = pathlib.Path(capsys.readouterr().out.splitlines()[-1])
  (clip,) = ClipSource(folder, 'train')
  assert clip_record.decode_emotion(clip) == 'happy'
  # The square around the quarter is the whole frame, in the shape that players show.
  np.testing.assert_allclose(clip['bbox'], [[0.25, 0.25, 0.75, 0.75]] * 30, atol=0.01)
  shown = next(video_reader.frames(root / 'anna' / 'a1.mp4'))
  assert shown.shape == (256, 256, 3)
  small = shown.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
  assert np.abs(clip_record.decode_frames(clip, [0])[0] - small).mean() < 4
  own, _ = soundfile.read(root / 'a1.wav')
  heard = clip_record.decode_audio(clip)
  np.testing.assert_allclose(heard, own[: len(heard), 0], atol=1e-4)


def test_a_folder_with_labels_by_command(tmp_path, capsys):
  root = tmp_path / 'mine'
  for name in ('a', 'b', 'c'):
    made_clips.write(root / f'{name}.mp4', 1.0)
  np.save(root / 'a.npy', np.random.default_rng(0).normal(size=(26, 7)))
  (root / 'labels.csv').write_text(
    'file,identity,emotion,intensity,split,expression\n'
    'a.mp4,anna,happy,3,train,a.npy\n'
    'b.mp4,anna,sad,1,val,\n'
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
    (
      lambda root: None,
      ['mead', '--root={root}/none'],
      'is not a folder; check the path',
    ),
    (
      lambda root: None,
      ['mead', '--root={root}'],
      'no clip of mead was found in {root}; expected <ID>/video/',
    ),
    (
      lambda root: made_clips.touch(root, 'a/b.mp4', 'c.zip'),
      ['mead', '--root={root}'],
      'the first of 2 left out is a/b.mp4 (path not understood)',
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


def test_linked_people_are_prepared_and_odd_names_are_reported(tmp_path, capsys):
  for name in ('p', 'q', 'disk/r'):
    made_clips.write(tmp_path / name / 'a.mp4', 0.6)
  root = tmp_path / 'corpus'
  root.mkdir()
  for name in ('p', 'q', 'disk'):
    (root / name).symlink_to(tmp_path / name)
  odd = os.fsdecode(b'rom\xe9.mp4')
  shutil.copy(tmp_path / 'p' / 'a.mp4', tmp_path / 'p' / odd)
  prepare.main(['folder', f'--root={root}', f'--out={tmp_path}/out', *FLAGS])
  lines = capsys.readouterr().out.splitlines()
  assert 'left out: 1 x name is not UTF-8' in lines
  folder = pathlib.Path(lines[-1])
  assert r'p/rom\xe9.mp4,name is not UTF-8,' in (folder / 'skipped.csv').read_text()
  people = {
    person
    for split in ('train', 'val')
    for person in ClipSource(folder, split).table.identity.tolist()
  }
  assert people == {'folder/p', 'folder/q', 'folder/r'}


def test_linked_features_are_found(tmp_path, capsys):
  for name in ('p', 'q'):
    made_clips.write(tmp_path / 'corpus' / name / 'a.mp4', 0.6)
    (tmp_path / 'disk' / name).mkdir(parents=True)
    np.save(tmp_path / 'disk' / name / 'a.npy', np.ones((15, 3)))
  features = tmp_path / 'features'
  features.mkdir()
  for name in ('p', 'q'):
    (features / name).symlink_to(tmp_path / 'disk' / name)
  prepare.main(
    [
      'folder',
      f'--root={tmp_path}/corpus',
      f'--expression={features}',
      f'--out={tmp_path}/out',
      '--dry_run',
      *FLAGS,
    ]
  )
  assert 'no expression features' not in capsys.readouterr().out

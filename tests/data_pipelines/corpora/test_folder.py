"""A user's folder, with labels and without; and trees that are not on a disk."""

import pathlib
import shutil

import fsspec
import pytest

from data_pipelines.corpora import folder
from data_pipelines.corpora.clip_file import ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree
from dicetalk_jax.errors import InputError
from tests.data_pipelines.made_clips import touch

FIELD_INPUTS = pathlib.Path(__file__).parents[2] / 'field_inputs'


def test_without_labels_the_folder_names_the_person(tmp_path):
  touch(tmp_path, 'anna/a.mp4', 'bert/b.MOV', 'alone.mp4', 'anna/a.wav', 'anna/a.docx')
  found = list(folder.walk(Tree(tmp_path)))
  clips = {clip.clip_id: clip.identity for clip in found if isinstance(clip, ClipFile)}
  assert clips == {
    'anna_a': 'folder/anna',
    'bert_b': 'folder/bert',
    'alone': 'folder/alone',
  }
  assert [skip for skip in found if isinstance(skip, Skipped)] == [
    Skipped('anna/a.docx', 'not a video file', '.docx')
  ]


def test_labels(tmp_path):
  touch(tmp_path, 'a.mp4', 'sub/b.mp4', 'c.mp4', 'b.wav', 'coeff/a.npy')
  (tmp_path / 'labels.csv').write_text(
    '\ufefffile, identity, emotion, intensity, split, audio, expression, start, end, '
    'text\na.mp4,anna,Happy,2,train,,coeff/a.npy,,,"Yes, it '
    'is"\na.mp4,anna,sad,,train,,,1.5,3,\nsub\\b.mp4,bert,,,val,b.wav,,,,\ngone.mp4,bert,,,,,,,,\n',
    encoding='utf-8',
  )
  first, second, third, gone, unlisted = folder.walk(Tree(tmp_path))
  assert (first.clip_id, first.emotion, first.intensity, first.split) == (
    'a',
    'happy',
    2,
    'train',
  )
  assert (
    first.expression == 'coeff/a.npy'
    and first.text == 'Yes, it is'
    and first.dataset == 'other'
  )
  assert (second.clip_id, second.start, second.end, second.video_id) == (
    'a_1500',
    1.5,
    3,
    'a',
  )
  assert (third.video, third.audio, third.identity) == (
    'sub/b.mp4',
    'b.wav',
    'folder/bert',
  )
  assert (gone.clip, gone.reason) == ('gone', 'file missing')
  assert (unlisted.clip, unlisted.reason) == ('c.mp4', 'not in the labels')


@pytest.mark.parametrize('name', ['labels_utf16.csv', 'labels_cr.csv'])
def test_labels_of_other_systems(tmp_path, name):
  touch(tmp_path, 'anna/a1.mp4')
  shutil.copy(FIELD_INPUTS / name, tmp_path / 'labels.csv')
  (clip,) = folder.walk(Tree(tmp_path))
  assert (clip.video, clip.emotion) == ('anna/a1.mp4', 'happy')


@pytest.mark.parametrize(
  'content', [b'', b'\n\n', b'\xff\xfe', bytes(100), b'file,"' * 2]
)
def test_labels_that_hold_no_table_are_refused(tmp_path, content):
  touch(tmp_path, 'a.mp4')
  (tmp_path / 'labels.csv').write_bytes(content)
  with pytest.raises(InputError, match='labels.csv: '):
    list(folder.walk(Tree(tmp_path)))


def test_a_cell_that_never_ends_is_refused(tmp_path):
  touch(tmp_path, 'a.mp4')
  (tmp_path / 'labels.csv').write_text('file,text\na.mp4,"' + 'x' * 200_000)
  with pytest.raises(InputError, match='labels.csv: line .*; save it as CSV in UTF-8'):
    list(folder.walk(Tree(tmp_path)))


@pytest.mark.parametrize(
  ('text', 'sentence'),
  [
    (
      'name\na.mp4\n',
      'labels.csv: the column `file` is missing; columns are file, identity',
    ),
    ('file,mood\na.mp4,happy\n', "column 'mood' is not known"),
    (
      'file,emotion\na.mp4,\na.mp4,joyful\n',
      "labels.csv, line 3: emotion 'joyful' is not known; choose one of angry",
    ),
    ('file,intensity\na.mp4,much\n', "line 2: intensity 'much' is not known"),
    ('file,start\na.mp4,nan\n', "line 2: start must be a number, got 'nan'"),
    ('file,end\na.mp4,inf\n', "line 2: end must be a number, got 'inf'"),
    ('file,intensity\na.mp4,4\n', "intensity '4' is not known"),
    ('file,split\na.mp4,dev\n', "split 'dev' is not known"),
    ('file,start,end\na.mp4,3,2\n', 'must start before it ends'),
    ('file,identity\n,anna\n', 'line 2: the cell of `file` is empty'),
  ],
)
def test_mistakes_in_the_labels_are_named(tmp_path, text, sentence):
  touch(tmp_path, 'a.mp4')
  (tmp_path / 'labels.csv').write_text(text)
  with pytest.raises(InputError) as error:
    list(folder.walk(Tree(tmp_path)))
  assert sentence in str(error.value)


def test_paths_may_be_written_in_more_than_one_way(tmp_path):
  touch(tmp_path, 'a/x.mp4', 'a/x.wav', 'a/x.npy')
  (tmp_path / 'labels.csv').write_text(
    'file,audio,expression\n./a/x.mp4,./a/x.wav,a\\..\\a//x.npy\n'
  )
  (clip,) = folder.walk(Tree(tmp_path))
  assert (clip.video, clip.audio, clip.expression) == ('a/x.mp4', 'a/x.wav', 'a/x.npy')


def test_labels_of_another_name_must_exist(tmp_path):
  touch(tmp_path, 'a.mp4')
  with pytest.raises(InputError, match='--labels=mine.csv is not in'):
    list(folder.walk(Tree(tmp_path), labels='mine.csv'))


def test_a_root_that_is_not_a_folder(tmp_path):
  touch(tmp_path, 'file')
  for root in (tmp_path / 'none', tmp_path / 'file'):
    with pytest.raises(InputError, match='is not a folder; check the path'):
      Tree(root)
  with pytest.raises(InputError, match='--expression=nowhere://x cannot be opened'):
    Tree('nowhere://x', '--expression')


def test_a_tree_may_lie_in_memory():
  elsewhere = fsspec.filesystem('memory')
  elsewhere.pipe_file('/corpus/anna/a.mp4', b'pictures')
  elsewhere.pipe_file('/corpus/.hidden/b.mp4', b'no')
  tree = Tree('memory://corpus')
  assert tree.files == ('anna/a.mp4',) and tree.size('anna/a.mp4') == 8
  with tree.local('anna/a.mp4') as path:
    assert path.endswith('a.mp4') and pathlib.Path(path).read_bytes() == b'pictures'
  (clip,) = folder.walk(tree)
  assert clip.clip_id == 'anna_a'

"""HDTF's metadata with its known pitfalls, and incomplete videos."""

import pytest

from data_pipelines.corpora import hdtf
from data_pipelines.corpora.clip_file import ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree
from data_pipelines.corpora.hdtf import Counts
from dicetalk_jax.errors import InputError
from tests.data_pipelines.made_clips import touch


@pytest.fixture
def root(tmp_path):
  """All pitfalls at once: a BOM, times in addresses, names without .mp4, trailing
  spaces, missing boxes.
  """
  texts = {
    'RD_video_url.txt': 'Radio1 https://www.youtube.com/watch?v=a\nRadio2 '
    'https://www.youtube.com/watch?v=b&t=12s\n',
    'RD_annotion_time.txt': 'Radio1.mp4 00:20-01:35\n',
    'RD_crop_wh.txt': 'Radio1_0.mp4 466 535 0 535\n',
    'RD_resolution.txt': 'Radio1.mp4 720\nRadio2.mp4 720\n',
    'WDA_video_url.txt': '\ufeffAdaLovelace0 https://www.youtube.com/watch?v=c&t=1s\n',
    'WDA_annotion_time.txt': 'AdaLovelace0.mp4 00:05-00:15 01:00-01:30 '
    '59:50-1:00:10 \n',
    'WDA_crop_wh.txt': 'AdaLovelace0_0.mp4 100 300 20 310\nAdaLovelace0_2.mp4 110 300 '
    '30 300\n',
    'WDA_resolution.txt': 'AdaLovelace0.mp4 1080\n',
    'WRA_annotion_time.txt': 'MittR.mp4 08:10-08:30 00:33-08:53\nAdaLovelace0.mp4 '
    '00:00-00:10\n',
  }
  for name, text in texts.items():
    (tmp_path / 'HDTF_dataset').mkdir(exist_ok=True)
    (tmp_path / 'HDTF_dataset' / name).write_text(text, encoding='utf-8')
  return tmp_path


def _walk(root, expressions=None):
  found = list(hdtf.walk(Tree(root), expressions))
  return (
    {clip.clip_id: clip for clip in found if isinstance(clip, ClipFile)},
    {skip.clip: skip.reason for skip in found if isinstance(skip, Skipped)},
  )


def test_videos_on_youtube(root):
  ids = {'RD_Radio1': 'a', 'RD_Radio2': 'b', 'WDA_AdaLovelace0': 'c'}
  assert hdtf.youtube_ids(Tree(root)) == ids
  clips, _ = _walk(_with_videos(root))
  assert {clip.video_id for clip in clips.values()} & ids.keys()
  (root / 'HDTF_dataset/RD_video_url.txt').write_text(
    'A https://youtu.be/x-_1?t=3\nB https://www.youtube.com/shorts/y\n'
    'C https://youtube.com/watch?app=desktop&v=z&t=1s\nD https://vimeo.com/1\n'
  )
  found = hdtf.youtube_ids(Tree(root))
  assert {name: found.get(f'RD_{name}') for name in 'ABCD'} == {
    'A': 'x-_1',
    'B': 'y',
    'C': 'z',
    'D': None,
  }


def _with_videos(root):
  (root / 'WDA_AdaLovelace0.mp4').touch()
  return root


def test_counts(root):
  _, counts = hdtf.metadata(Tree(root))
  assert counts == [
    Counts('RD', 2, 1, 1, 1, 75 / 3600),
    Counts('WDA', 1, 1, 3, 2, 60 / 3600),
    Counts('WRA', 0, 2, 3, 0, 530 / 3600),
  ]
  assert str(counts[1]) == (
    'WDA lists 1 URLs, 1 annotated videos, 3 clips, 2 with a crop box, 0.02 h '
    '(the published files: 183, 183, 195, 189)'
  )
  assert str(Counts('RD', 57, 56, 66, 64, 1.2)).endswith('64 with a crop box, 1.20 h')


def test_one_video_under_two_names_shows_one_person(tmp_path):
  (tmp_path / 'WDA_video_url.txt').write_text(
    'WhipAda https://www.youtube.com/watch?v=c\n'
    'AdaLovelace https://www.youtube.com/watch?v=d\n'
    'AdaLovelace1 https://www.youtube.com/watch?v=c&t=5s\n'
    'Other https://www.youtube.com/watch?v=e\n'
  )
  (tmp_path / 'WDA_annotion_time.txt').write_text(
    ''.join(
      f'{name}.mp4 00:05-04:40\n'
      for name in ('AdaLovelace1', 'AdaLovelace', 'WhipAda', 'Other')
    )
  )
  videos, _ = hdtf.metadata(Tree(tmp_path))
  assert [video.identity for video in videos] == ['hdtf/WDA/WhipAda'] * 3 + [
    'hdtf/WDA/Other'
  ]


def test_intervals_keep_their_numbers_where_boxes_are_missing(root):
  touch(root, 'videos/WDA_AdaLovelace0.mp4')
  clips, skipped = _walk(root)
  assert {name: (clip.start, clip.end, clip.crop) for name, clip in clips.items()} == {
    'WDA_AdaLovelace0_0': (5, 15, (100, 20, 300, 310)),
    'WDA_AdaLovelace0_1': (60, 90, None),
    'WDA_AdaLovelace0_2': (3590, 3610, (110, 30, 300, 300)),
  }
  first = clips['WDA_AdaLovelace0_0']
  assert (
    first.identity == 'hdtf/WDA/AdaLovelace' and first.video_id == 'WDA_AdaLovelace0'
  )
  assert first.crop_height == 1080 and first.emotion == 'unknown'
  assert skipped == dict.fromkeys(
    ['RD_Radio1_0', 'WRA_MittR_0', 'WRA_MittR_1', 'WRA_AdaLovelace0_0'], 'video missing'
  )


def test_names_with_and_without_subset(root):
  touch(
    root,
    'RD/Radio1.mp4',
    'WRA/AdaLovelace0.mkv',
    'WDA/AdaLovelace0.mp4',
    'Radio77.mp4',
    'WRA_MittR.mp4.part',
  )
  clips, skipped = _walk(root)
  assert (
    clips['RD_Radio1_0'].video == 'RD/Radio1.mp4'
    and clips['RD_Radio1_0'].identity == 'hdtf/RD/Radio'
  )
  assert clips['WRA_AdaLovelace0_0'].video == 'WRA/AdaLovelace0.mkv'
  assert clips['WDA_AdaLovelace0_1'].video == 'WDA/AdaLovelace0.mp4'
  assert (
    skipped['Radio77.mp4'] == 'not in the metadata'
    and skipped['WRA_MittR.mp4.part'] == 'not a video file'
  )


def test_an_interval_that_covers_another_is_left_out(root):
  touch(root, 'MittR.mp4')
  clips, skipped = _walk(root)
  assert set(clips) == {'WRA_MittR_0'}
  assert skipped['WRA_MittR_1'] == 'interval covers another or is empty'


@pytest.mark.parametrize(
  ('intervals', 'kept', 'reasons'),
  [
    ('00:00-00:20 00:19-00:50', [0, 1], []),  # neighbours share a second
    (
      '00:00-00:50 00:10-00:20 00:15-00:40',
      [1, 2],
      ['interval covers another or is empty'],
    ),
    (
      '00:10-00:20 00:10-00:20 00:00-00:00',
      [0],
      ['the same interval twice', 'interval covers another or is empty'],
    ),
  ],
)
def test_intervals_that_overlap(tmp_path, intervals, kept, reasons):
  (tmp_path / 'RD_annotion_time.txt').write_text(f'Radio1.mp4 {intervals}\n')
  touch(tmp_path, 'Radio1.mp4')
  clips, skipped = _walk(tmp_path)
  assert (
    list(clips) == [f'RD_Radio1_{i}' for i in kept]
    and list(skipped.values()) == reasons
  )


def test_clips_cut_before_are_taken_whole(root):
  touch(
    root,
    'WDA_AdaLovelace0_000.mp4',
    'cut/AdaLovelace0_2.mp4',
    'coeff/WDA_AdaLovelace0_0.npy',
  )
  clips, skipped = _walk(root, Tree(root))
  assert {
    name: (clip.video, clip.start, clip.end, clip.crop) for name, clip in clips.items()
  } == {
    'WDA_AdaLovelace0_0': ('WDA_AdaLovelace0_000.mp4', 0, None, None),
    'WDA_AdaLovelace0_2': ('cut/AdaLovelace0_2.mp4', 0, None, None),
  }
  assert skipped['WDA_AdaLovelace0_1'] == 'video missing'


def test_features_of_the_clip_or_of_the_video(root):
  touch(root, 'AdaLovelace0.mp4', 'coeff/AdaLovelace0.npy')
  touch(root, 'coeff/WDA_AdaLovelace0_0.npy')
  clips, _ = _walk(root, Tree(root / 'coeff'))
  own, shared = clips['WDA_AdaLovelace0_0'], clips['WDA_AdaLovelace0_1']
  assert (own.expression, own.expression_of_video) == ('WDA_AdaLovelace0_0.npy', False)
  assert (shared.expression, shared.expression_of_video) == ('AdaLovelace0.npy', True)


def test_without_metadata(tmp_path):
  touch(tmp_path, 'RD_Radio1.mp4')
  with pytest.raises(InputError, match='RD_annotion_time.txt'):
    _walk(tmp_path)

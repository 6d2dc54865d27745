"""MEAD's layout and the ways in which copies of it differ."""

import pytest

from data_pipelines.corpora import mead
from data_pipelines.corpora.clip_file import ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree
from data_pipelines.corpora.mead import Take
from tests.data_pipelines.made_clips import touch


def _walk(root, **options):
  found = list(mead.walk(Tree(root), **options))
  return (
    {clip.clip_id: clip for clip in found if isinstance(clip, ClipFile)},
    {skip.clip: skip.reason for skip in found if isinstance(skip, Skipped)},
  )


@pytest.mark.parametrize(
  ('path', 'take'),
  [
    ('M003/video/front/angry/level_3/001', Take('M003', 'angry', 3, '001', 'front')),
    (
      'W009/W009_video/video/left_30/surprised/level_1/030',
      Take('W009', 'surprised', 1, '030', 'left_30'),
    ),
    (
      'M003/M003_video/front/disgusted_level_2/7',
      Take('M003', 'disgusted', 2, '007', 'front'),
    ),
    ('audio/M003/audio/neutral/level_1/012', Take('M003', 'neutral', 1, '012', '')),
    ('clips/M003_ang_3_004', Take('M003', 'angry', 3, '004', '')),
    (
      'M030_right_60_contempt_level2_011',
      Take('M030', 'contempt', 2, '011', 'right_60'),
    ),
    ('W015/video/down/fear/level_2/009', Take('W015', 'fear', 2, '009', 'down')),
    ('W015/video/top/Happy/Level_2/009', Take('W015', 'happy', 2, '009', 'top')),
  ],
)
def test_paths_say_who_and_how(path, take):
  assert mead.parse(path) == take


@pytest.mark.parametrize(
  'path',
  [
    'M003/video/front/angry/001',
    'video/front/angry/level_3/001',
    'XM003/sad/level_1/001',
    'M003/video/front/level_3/001',
    'M003/video/front/sad/level_3/intro',
  ],
)
def test_other_paths_say_nothing(path):
  assert mead.parse(path) is None


def test_the_published_layout(tmp_path):
  touch(
    tmp_path,
    *(f'M003/video/{view}/sad/level_2/001.mp4' for view in ('front', 'left_30')),
    'M003/video/front/neutral/level_1/002.mp4',
    'M003/audio/sad/level_2/001.m4a',
    'M003/video/front/readme.txt',
    'M003/video/front/sad.zip',
    'M003/video/front/sad/level_2/x.mp4',
    'M003/.DS_Store',
    '.trash/M003/a.mp4',
  )
  clips, skipped = _walk(tmp_path)
  assert set(clips) == {'M003_front_sad_2_001', 'M003_front_neutral_1_002'}
  sad, neutral = clips['M003_front_sad_2_001'], clips['M003_front_neutral_1_002']
  assert (sad.emotion, sad.intensity, sad.identity, sad.dataset) == (
    'sad',
    2,
    'mead/M003',
    'mead',
  )
  assert (
    sad.video == 'M003/video/front/sad/level_2/001.mp4'
    and sad.audio == 'M003/audio/sad/level_2/001.m4a'
  )
  assert neutral.audio == ''  # the audio track of the video
  assert skipped == {
    'M003/video/front/sad.zip': 'not a video file',
    'M003/video/front/sad/level_2/x.mp4': 'path not understood',
  }
  both, _ = _walk(tmp_path, views=('front', 'left_30'))
  left = both['M003_left_30_sad_2_001']
  assert (
    left.audio == sad.audio and left.video_id == sad.video_id
  )  # one take, seen from two sides


def test_extra_levels_and_other_audio_files(tmp_path):
  touch(
    tmp_path,
    'W009/W009_video/video/front/fear/level_1/003.MP4',
    'W009/W009_audio/audio/front/fear/level_1/003.wav',
    'M005/video/front/happy_level_3/004.mp4',
    'M005/audio/happy_level_3/004.wav',
    'flat/M007_ang_3_004.mp4',
  )
  clips, skipped = _walk(tmp_path)
  assert {clip.clip_id: clip.audio for clip in clips.values()} == {
    'W009_front_fear_1_003': 'W009/W009_audio/audio/front/fear/level_1/003.wav',
    'M005_front_happy_3_004': 'M005/audio/happy_level_3/004.wav',
    'M007_front_angry_3_004': '',
  }
  assert not skipped


def test_features_are_found_by_what_their_names_say(tmp_path):
  touch(
    tmp_path / 'mead',
    'M003/video/front/sad/level_2/001.mp4',
    'M003/video/front/sad/level_2/002.mp4',
  )
  touch(tmp_path / 'coeff', 'M003_front_sad_level2_001.mat', 'M003/sad/level_2/002.npy')
  clips, _ = _walk(tmp_path / 'mead', expressions=Tree(tmp_path / 'coeff'))
  assert [clip.expression for clip in clips.values()] == [
    'M003_front_sad_level2_001.mat',
    'M003/sad/level_2/002.npy',
  ]

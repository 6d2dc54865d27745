"""VoxCeleb2's two trees."""

from data_pipelines.corpora import voxceleb2
from data_pipelines.corpora.clip_file import ClipFile, Skipped
from data_pipelines.corpora.file_tree import Tree
from tests.data_pipelines.made_clips import touch


def test_frames_and_audio_are_paired_by_part(tmp_path):
  touch(
    tmp_path,
    'vox2/dev/mp4/id00012/aB-_c/00001.mp4',
    'vox2/dev/aac/id00012/aB-_c/00001.m4a',
    'vox2/dev/mp4/id00012/aB-_c/00002.mp4',
    'vox2/test/mp4/id00017/x/00001.mp4',
    'vox2/test/aac/id00017/x/00001.wav',
    'vox2/dev/mp4/id1/x/00001.mp4',
    'vox2/dev/vox2_dev_aac_partaa',
    'vox2/vox2_meta.csv',
  )
  found = list(voxceleb2.walk(Tree(tmp_path)))
  first, second, third = (clip for clip in found if isinstance(clip, ClipFile))
  assert first.clip_id == 'id00012_aB-_c_00001' and first.identity == 'vox2/id00012'
  assert first.video_id == second.video_id == 'id00012/aB-_c'
  assert [clip.audio for clip in (first, second, third)] == [
    'vox2/dev/aac/id00012/aB-_c/00001.m4a',
    '',
    'vox2/test/aac/id00017/x/00001.wav',
  ]
  assert [clip.split for clip in (first, second, third)] == ['', '', 'test']
  assert first.emotion == 'unknown' and first.dataset == 'voxceleb2'
  assert [(skip.clip, skip.reason) for skip in found if isinstance(skip, Skipped)] == [
    ('vox2/dev/mp4/id1/x/00001.mp4', 'path not understood'),
    ('vox2/dev/vox2_dev_aac_partaa', 'not a video file'),
  ]


def test_a_part_may_be_the_root(tmp_path):
  touch(
    tmp_path,
    'mp4/id00012/a/00001.mp4',
    'aac/id00012/a/00001.m4a',
    'mp4/id00012/a/00001.npy',
  )
  (clip,) = voxceleb2.walk(Tree(tmp_path), Tree(tmp_path))
  assert clip.audio == 'aac/id00012/a/00001.m4a' and clip.split == ''
  assert clip.expression == 'mp4/id00012/a/00001.npy'

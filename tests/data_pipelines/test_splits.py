"""Splits: no person is in two of them."""

import pytest

from data_pipelines import splits
from data_pipelines.corpora.clip_file import ClipFile


def _clip(corpus, person, video, **more):
  return ClipFile(
    f'{person}_{video}',
    f'{person}_{video}',
    f'{corpus}/{person}',
    corpus,
    'v.mp4',
    **more,
  )


def _people(clips, split):
  return {
    name: {clip.identity for clip in clips if split[clip.clip_id] == name}
    for name in splits.SPLITS
  }


def _check_disjoint(clips, split):
  people = _people(clips, split)
  assert sum(map(len, people.values())) == len(set.union(*people.values()))
  assert not splits.shared_people(clips, split)
  return people


def test_mead_keeps_its_test_actors():
  names = [f'M{i:03d}' for i in (3, 5, 7, 9, 30, 37)] + [
    f'W{i:03d}' for i in (9, 11, 14, 15)
  ]
  clips = [_clip('mead', name, video) for name in names for video in range(4)]
  people = _check_disjoint(clips, splits.assign('mead', clips))
  assert people['test'] == set(splits.MEAD_TEST)
  assert len(people['val']) == 1 and len(people['train']) == 4


def test_hdtf_draws_whole_people_until_twenty_videos():
  clips = [
    _clip('hdtf', f'WDA/Person{i}', video)
    for i in range(60)
    for video in range(1 + i % 4)
  ]
  clips += [_clip('hdtf', 'RD/Radio', video) for video in range(56)]
  split = splits.assign('hdtf', clips)
  people = _check_disjoint(clips, split)
  assert sum(name == 'test' for name in split.values()) == 20
  assert 'hdtf/RD/Radio' in people['train']
  few = clips[:10]
  assert 1 <= sum(name == 'test' for name in splits.assign('hdtf', few).values()) <= 2


def test_voxceleb2_keeps_its_test_part():
  clips = [
    _clip('vox2', f'id{i:05d}', video, split='test' if i > 90 else '')
    for i in range(100)
    for video in range(2)
  ]
  people = _check_disjoint(clips, splits.assign('voxceleb2', clips))
  assert people['test'] == {f'vox2/id{i:05d}' for i in range(91, 100)}
  assert len(people['val']) == 4


def test_people_of_a_folder_are_drawn_by_name():
  clips = [_clip('folder', f'p{i}', video) for i in range(40) for video in range(3)]
  people = _check_disjoint(clips, splits.assign('folder', clips))
  assert (len(people['test']), len(people['val'])) == (4, 1)
  assert splits.assign('folder', clips[::-1]) == splits.assign('folder', clips)
  assert set(splits.assign('folder', clips[:3]).values()) == {'train'}  # one person
  two = splits.assign('folder', clips[:6])
  assert sorted(two.values()) == ['train'] * 3 + ['val'] * 3


@pytest.mark.parametrize('corpus', ['mead', 'hdtf', 'folder', 'voxceleb2'])
def test_a_column_of_splits_is_followed(corpus):
  clips = [
    _clip('folder', 'anna', 0, split='test'),
    _clip('folder', 'anna', 1, split='train'),
    _clip('folder', 'bert', 0, split='val'),
  ]
  split = splits.assign(corpus, clips)
  assert list(split.values()) == ['test', 'train', 'val']
  assert splits.shared_people(clips, split) == ['folder/anna']

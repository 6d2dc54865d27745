"""The data sets of a configuration and their weights."""

import importlib
import types

import ml_collections
import numpy as np
import pytest

from dicetalk_jax.data import clip_record
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError
from dicetalk_jax.training import datasets


def opened(dataset, monkeypatch):
  monkeypatch.setattr(datasets, 'ClipSource', lambda folder, split: (folder, split))
  monkeypatch.setattr(datasets, 'leave_out_tests', lambda parts: parts)
  config = ml_collections.ConfigDict(dict(data=dict(dataset=dataset)))
  return [
    [(*part.source, part.weight) for part in parts]
    for parts in datasets.open_train_and_val(config, 'unused')
  ]


def test_one_data_set(monkeypatch):
  assert opened('/corpora/mead/1.0.0', monkeypatch) == [
    [('/corpora/mead/1.0.0', 'train', None)],
    [('/corpora/mead/1.0.0', 'val', None)],
  ]


def test_several_by_weight(monkeypatch):
  train, val = opened('mead=0.5, hdtf=0.25,vox=.25', monkeypatch)
  assert train == [
    ('mead', 'train', 0.5),
    ('hdtf', 'train', 0.25),
    ('vox', 'train', 0.25),
  ]
  assert val == [(name, 'val', weight) for name, _, weight in train]


class Corpus:
  """One split of a corpus: `videos` gives the YouTube video of each clip by split."""

  def __init__(self, name, videos, split='train'):
    self.name = name
    self.videos = videos
    self.youtube_ids = np.array(videos[split])
    index = clip_record.DATASETS.index(name)
    self.table = types.SimpleNamespace(dataset=np.full(len(self), index))

  def __len__(self):
    return len(self.youtube_ids)

  def __repr__(self):
    return self.name

  def other(self, split):
    return Corpus(self.name, self.videos, split) if split in self.videos else None


def left_out(*sources):
  parts = datasets.leave_out_tests([DatasetPart(source) for source in sources])
  return [set(part.left_out) for part in parts]


def test_videos_for_test_are_left_out_of_other_data_sets(capsys):
  hdtf = Corpus('hdtf', {'train': ['a', 'a', 'b', ''], 'test': ['c', 'd', '']})
  vox = Corpus('voxceleb2', {'train': ['d', 'x', 'c', 'd'], 'test': ['a']})
  mead = Corpus('mead', {'train': ['', '']})
  assert left_out(mead, hdtf, vox) == [set(), {0, 1}, {0, 2, 3}]
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 2
  assert '2 clips of hdtf, from 1 YouTube videos' in said[0] and said[0].endswith(': a')
  assert '3 clips of voxceleb2, from 2' in said[1] and said[1].endswith(': c, d')
  assert left_out(mead, hdtf) == [set(), set()]
  assert not capsys.readouterr().out


def test_videos_that_nobody_can_compare_are_said(capsys):
  hdtf = Corpus('hdtf', {'train': ['', ''], 'test': ['']})
  vox = Corpus('voxceleb2', {'train': ['d'], 'test': ['a']})
  assert left_out(hdtf, vox) == [set(), set()]
  assert 'hdtf does not say which YouTube videos it has' in capsys.readouterr().out


def test_a_data_set_of_which_nothing_is_left_is_refused():
  hdtf = Corpus('hdtf', {'train': ['b'], 'test': ['c']})
  with pytest.raises(
    DataError, match='all videos of voxceleb2 .* leave one of the two'
  ):
    left_out(hdtf, Corpus('voxceleb2', {'train': ['c', 'c']}))


def test_other_corpora_than_asked_for_are_refused():
  parts = [DatasetPart(Corpus(name, {'train': ['']})) for name in ('mead', 'hdtf')]
  datasets._check_corpora(parts, ())
  datasets._check_corpora(parts, ('hdtf', 'mead'))
  for wanted, found in ((('mead',), parts), (('mead', 'hdtf'), parts[:1])):
    with pytest.raises(ConfigError, match='config.data.corpora=.* come from .*mead'):
      datasets._check_corpora(found, wanted)


@pytest.mark.parametrize(
  'dataset', ['a=b', 'a=', 'a=0', 'a=-1', 'a=nan', 'a=inf', 'a,', '=1', 'a=1,a=2', '']
)
def test_what_is_no_mixture_is_refused(dataset, monkeypatch):
  with pytest.raises(ConfigError, match='FOLDER=WEIGHT,FOLDER=WEIGHT'):
    opened(dataset, monkeypatch)


def test_missing_data_sets_are_named(tmp_path):
  config = ml_collections.ConfigDict(dict(data=dict(dataset='synthetic')))
  with pytest.raises(DataError, match=r'prepare synthetic --out=.*, and add --tiny'):
    datasets.open_train_and_val(config, tmp_path)
  config.data.dataset = '/nowhere'
  with pytest.raises(DataError, match='/nowhere holds no prepared data set'):
    datasets.open_train_and_val(config, tmp_path)


def test_the_synthetic_data_set_is_found_and_must_be_the_only_one(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(datasets, 'ClipSource', lambda folder, split: (folder, split))
  config = ml_collections.ConfigDict(dict(data=dict(dataset='synthetic=2')))
  for name in ('first', 'second'):
    folder = tmp_path / 'synthetic' / name / '1.0.0'
    folder.mkdir(parents=True)
    (folder / 'dataset_info.json').touch()
    if name == 'first':
      (part,), _ = datasets.open_train_and_val(config, tmp_path)
      assert part.source == (folder, 'train') and part.weight == 2
  with pytest.raises(ConfigError, match='could be any of .*first.*, .*second.*; name'):
    datasets.open_train_and_val(config, tmp_path)


def test_training_without_a_single_label_is_announced(capsys):
  config = importlib.import_module('configs.diffusion').get_config('tiny')
  labelled = types.SimpleNamespace(labelled=True)
  regular = types.SimpleNamespace(labelled=False)
  datasets.announce_unlabelled(config, [regular, labelled])
  assert capsys.readouterr().out == ''
  datasets.announce_unlabelled(config, [regular, regular])
  assert capsys.readouterr().out.startswith(
    'no training clip of synthetic has an emotion label: the emotion classifier learns '
    'nothing'
  )
  config.loss.lambda_cls = 0.0
  datasets.announce_unlabelled(config, [regular])
  assert capsys.readouterr().out == ''

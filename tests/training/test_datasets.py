"""The data sets of a configuration and their weights."""

import importlib
import types

import ml_collections
import pytest

from dicetalk_jax.errors import ConfigError, DataError
from dicetalk_jax.training import datasets


def opened(dataset, monkeypatch):
  monkeypatch.setattr(datasets, 'ClipSource', lambda folder, split: (folder, split))
  config = ml_collections.ConfigDict(dict(data=dict(dataset=dataset)))
  return [
    [(*part.source, part.weight) for part in parts]
    for parts in datasets.open_train_and_val(config, 'unused')
  ]


def test_one_data_set(monkeypatch):
  assert opened('/corpora/mead/1.0.0', monkeypatch) == [
    [('/corpora/mead/1.0.0', 'train', 1.0)],
    [('/corpora/mead/1.0.0', 'val', 1.0)],
  ]


def test_several_by_weight(monkeypatch):
  train, val = opened('mead=0.5, hdtf=0.25,vox=.25', monkeypatch)
  assert train == [
    ('mead', 'train', 0.5),
    ('hdtf', 'train', 0.25),
    ('vox', 'train', 0.25),
  ]
  assert val == [(name, 'val', weight) for name, _, weight in train]


@pytest.mark.parametrize(
  'dataset', ['a=b', 'a=0', 'a=-1', 'a=nan', 'a=inf', 'a,', '=1', 'a=1,a=2', '']
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

"""The data sets that a task trains and validates on (`config.data`)."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

from etils import epath
import jax
import numpy as np

from dicetalk_jax.data.clip_record import DATASETS
from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError

SYNTHETIC = 'synthetic'
YOUTUBE = {'hdtf', 'voxceleb2'}  # corpora that come from there


def open_train_and_val(
  config: Any, data_dir: epath.Path
) -> tuple[list[DatasetPart], list[DatasetPart]]:
  """Opens the training and validation clips of all data sets, with their weights.

  `config.data.dataset` names one data set or several: `A`, `A,B` or
  `A=0.5,B=0.25,C=0.25`. Each is the folder of a prepared data set, or 'synthetic' for
  the one below `data_dir` that `python -m data_pipelines.prepare synthetic` made.

  Of the training clips, those are left out whose video is for test in another data set;
  see `leave_out_tests`.

  Raises:
    ConfigError: a weight is not a positive number, there are several synthetic data
      sets, or the data sets come from other corpora than `config.data.corpora`.
    DataError: a data set is missing, or nothing of it is left.
  """
  train = []
  val = []
  for name, weight in _weights(config.data.dataset).items():
    folder = _synthetic(data_dir) if name == SYNTHETIC else name
    train.append(DatasetPart(ClipSource(folder, 'train'), weight=weight))
    val.append(DatasetPart(ClipSource(folder, 'val'), weight=weight))
  _check_corpora(train, config.data.get('corpora', ()))
  if len(train) > 1:
    train = leave_out_tests(train)
  return train, val


def announce_unlabelled(config: Any, parts: Sequence[DatasetPart]) -> None:
  """Says what it means for the diffusion model that no clip has an emotion label.

  Args:
    config: with `emo_model`.
    parts: the data sets to train on.
  """
  if not config.loss.lambda_cls or any(part.labelled for part in parts):
    return
  _say(
    f'no training clip of {config.data.dataset} has an emotion label: the emotion '
    'classifier learns nothing, its loss stays 0, and emotions are learned from the '
    'priors of the clips alone; add a data set with labels to config.data.dataset, or '
    'set config.loss.lambda_cls=0'
  )


def leave_out_tests(parts: Sequence[DatasetPart]) -> list[DatasetPart]:
  """Leaves out of each part the clips whose YouTube video is in the test split of
  another data set, and prints which: HDTF and VoxCeleb2 share videos.

  People whom the data sets know under different names cannot be seen.

  Raises:
    DataError: nothing is left of a part.
  """
  tests = [_test_videos(part.source) for part in parts]
  kept = []
  for part, own_tests in zip(parts, tests):
    others = set[str]().union(*(test for test in tests if test is not own_tests))
    shared = sorted(others & set(part.source.youtube_ids))
    if shared:
      clips = np.flatnonzero(np.isin(part.source.youtube_ids, shared))
      _say(
        f'left out of training: {len(clips)} clips of {part.source}, from '
        f'{len(shared)} YouTube videos that are for test in another data set: '
        f'{", ".join(shared)}'
      )
      part = dataclasses.replace(part, left_out=frozenset(clips.tolist()))
      if not len(part.clips):
        raise DataError(
          f'all videos of {part.source} are for test in another data set, and nothing '
          'is left to train on; leave one of the two out of config.data.dataset'
        )
    kept.append(part)
  _report_unknown(parts)
  return kept


def _test_videos(source: ClipSource) -> set[str]:
  """The YouTube videos of the test split of a data set."""
  test = source.other('test')
  return set() if test is None else set(test.youtube_ids) - {''}


def _report_unknown(parts: Sequence[DatasetPart]) -> None:
  """Says of which data sets the videos are not known, if several come from YouTube."""
  from_youtube = [part for part in parts if _corpora([part]) & YOUTUBE]
  if len(from_youtube) < 2:
    return
  for part in from_youtube:
    if not any(part.source.youtube_ids):
      _say(
        f'{part.source} does not say which YouTube videos it has, so those that are '
        'for test in one data set and for training in another cannot be left out; '
        'delete it and prepare it again, with the lists of addresses'
      )


def _say(text: str) -> None:
  """Prints a line, on one process."""
  if jax.process_index() == 0:
    print(text, flush=True)


def _corpora(parts: Sequence[DatasetPart]) -> set[str]:
  """The corpora that clips come from."""
  return {
    DATASETS[index] for part in parts for index in np.unique(part.source.table.dataset)
  }


def _check_corpora(parts: Sequence[DatasetPart], wanted: Sequence[str]) -> None:
  """Refuses data of other corpora than those asked for."""
  if not wanted:
    return
  found = _corpora(parts)
  if found != set(wanted):
    raise ConfigError(
      f'config.data.corpora={tuple(wanted)}, but the data sets of config.data.dataset '
      f'come from {", ".join(sorted(found))}; name prepared data sets of exactly those '
      'corpora, or set config.data.corpora=() to allow any'
    )


def _weights(dataset: str) -> Mapping[str, float | None]:
  """Returns weights by name, from `NAME,NAME` or `NAME=WEIGHT,NAME=WEIGHT`; None where
  there is none.
  """
  weights: dict[str, float | None] = {}
  for entry in dataset.split(','):
    name, is_weighted, text = entry.strip().partition('=')
    weight = _number(text) if is_weighted else None
    is_usable = weight is None or 0 < weight < float('inf')
    if not name or not is_usable or name in weights:
      raise ConfigError(
        f'config.data.dataset={dataset!r} is not understood at {entry!r}; '
        'write FOLDER, or FOLDER=WEIGHT,FOLDER=WEIGHT with positive weights'
      )
    weights[name] = weight
  return weights


def _number(text: str) -> float:
  """The number that a text states; 0 if it states none."""
  try:
    return float(text)
  except ValueError:
    return 0.0


def _synthetic(data_dir: epath.Path) -> os.PathLike:
  """Finds the synthetic data set below a folder."""
  # TFDS names folders NAME/SETTINGS/VERSION, and incomplete.* while it writes them.
  marks = (epath.Path(data_dir) / SYNTHETIC).glob('*/*/dataset_info.json')
  folders = [mark.parent for mark in marks]
  found = sorted(path for path in folders if not path.name.startswith('incomplete.'))
  if not found:
    raise DataError(
      f'there is no synthetic data set below {data_dir}; prepare a corpus with python '
      '-m data_pipelines.prepare and name the folder that it prints in '
      '--config.data.dataset=DIR, or make synthetic data with python -m '
      f'data_pipelines.prepare synthetic --out={data_dir}, and add --tiny for the '
      "presets 'tiny'"
    )
  if len(found) > 1:
    names = ', '.join(str(path) for path in found)
    raise ConfigError(
      f"config.data.dataset='{SYNTHETIC}' could be any of {names}; name the folder of "
      'one of them'
    )
  return found[0]

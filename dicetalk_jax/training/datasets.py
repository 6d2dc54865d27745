"""The data sets that a task trains and validates on (`config.data`)."""

from collections.abc import Sequence
import os
from typing import Any

from etils import epath
import jax

from dicetalk_jax.data.clip_source import ClipSource
from dicetalk_jax.data.mixture import DatasetPart
from dicetalk_jax.errors import ConfigError, DataError

SYNTHETIC = 'synthetic'


def open_train_and_val(
  config: Any, data_dir: epath.Path
) -> tuple[list[DatasetPart], list[DatasetPart]]:
  """Opens the training and validation clips of all data sets, with their weights.

  `config.data.dataset` names one data set or several: `A` or `A=0.5,B=0.25,C=0.25`.
  Each is the folder of a prepared data set, or 'synthetic' for the one below
  `data_dir` that `python -m data_pipelines.prepare synthetic` made.

  Raises:
    ConfigError: a weight is not a positive number, or there are several synthetic data
      sets.
    DataError: a data set is missing.
  """
  train = []
  val = []
  for name, weight in _weights(config.data.dataset).items():
    folder = _synthetic(data_dir) if name == SYNTHETIC else name
    train.append(DatasetPart(ClipSource(folder, 'train'), weight=weight))
    val.append(DatasetPart(ClipSource(folder, 'val'), weight=weight))
  return train, val


def announce_unlabelled(config: Any, parts: Sequence[DatasetPart]) -> None:
  """Says what it means for the diffusion model that no clip has an emotion label.

  Args:
    config: with `emo_model`.
    parts: the data sets to train on.
  """
  if not config.loss.lambda_cls or any(part.labelled for part in parts):
    return
  if jax.process_index() == 0:
    print(
      f'no training clip of {config.data.dataset} has an emotion label: the emotion '
      'classifier learns nothing, its loss stays 0, and emotions are learned from the '
      'priors of the clips alone; add a data set with labels to config.data.dataset, '
      'or set config.loss.lambda_cls=0',
      flush=True,
    )


def _weights(dataset: str) -> dict[str, float]:
  """Returns weights by name, from `NAME` or `NAME=WEIGHT,NAME=WEIGHT`."""
  weights: dict[str, float] = {}
  for entry in dataset.split(','):
    name, _, text = entry.strip().partition('=')
    try:
      weight = float(text or 1)
    except ValueError:
      weight = 0.0
    if not name or not 0 < weight < float('inf') or name in weights:
      raise ConfigError(
        f'config.data.dataset={dataset!r} is not understood at {entry!r}; '
        'write FOLDER, or FOLDER=WEIGHT,FOLDER=WEIGHT with positive weights'
      )
    weights[name] = weight
  return weights


def _synthetic(data_dir: epath.Path) -> os.PathLike:
  """Finds the synthetic data set below a folder."""
  # TFDS names folders NAME/SETTINGS/VERSION, and incomplete.* while it writes them.
  marks = (epath.Path(data_dir) / SYNTHETIC).glob('*/*/dataset_info.json')
  folders = [mark.parent for mark in marks]
  found = sorted(path for path in folders if not path.name.startswith('incomplete.'))
  if not found:
    raise DataError(
      f'there is no synthetic data set below {data_dir}; make one with python -m '
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

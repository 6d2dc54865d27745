"""Where a task's clips come from, and what it tells about itself in the model folder."""

import functools
from typing import Any

from etils import epath

from data_pipelines.loader import Part
from data_pipelines.source import ClipSource
from dicetalk_jax.errors import ConfigError


def train_and_val(config: Any, data_dir: epath.Path) -> tuple[list[Part], list[Part]]:
  """Opens the training and validation clips of the data sets of `config.data`, with their weights.

  `dataset` names one data set or several: `A` or `A=0.5,B=0.25,C=0.25`. Each is the folder of a prepared data set, or
  'synthetic', which is generated under `data_dir` where it is missing.

  Raises:
    ConfigError: a weight is no positive number, or the settings of 'synthetic' are missing.
  """
  folders = {}
  for entry in config.data.dataset.split(','):
    name, _, weight = entry.strip().partition('=')
    try:
      share = float(weight or 1)
    except ValueError:
      share = 0.
    if not name or not 0 < share < float('inf') or name in folders:
      raise ConfigError(f'config.data.dataset={config.data.dataset!r} is not understood at {entry!r}; write FOLDER, or '
                        'FOLDER=WEIGHT,FOLDER=WEIGHT with positive weights')
    folders[name] = share
  opened = [(_folder(name, config.data.get('synthetic'), str(data_dir)), share) for name, share in folders.items()]
  train, val = ([Part(ClipSource(folder, split), weight=share) for folder, share in opened]
                for split in ('train', 'val'))
  return train, val


def _folder(dataset: str, settings: Any, data_dir: str):
  if dataset != 'synthetic':
    return dataset
  if settings is None:
    raise ConfigError("config.data.dataset='synthetic' needs config.data.synthetic, as in the preset 'tiny'; "
                      'or name the folder of a prepared data set')
  return _prepare(data_dir, tuple(settings.to_dict().items()))


@functools.cache
def _prepare(data_dir: str, settings: tuple[tuple[str, Any], ...]):
  from data_pipelines.builders.synthetic import SyntheticConfig, prepare_synthetic  # TFDS takes seconds to import
  return prepare_synthetic(data_dir, SyntheticConfig(**dict(settings)))


def provenance(task: Any) -> dict[str, Any]:
  """What a trained component says of its origin in `bundle.json`."""
  c = task.config
  return {'source': f'trained by dicetalk_jax.main, task {task.name}', 'steps': c.total_steps, 'seed': c.seed,
          'data': c.data.dataset, 'init_from': c.init_from}

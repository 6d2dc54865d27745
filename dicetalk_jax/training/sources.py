"""Where a task's clips come from, and what it tells about itself in the model folder."""

import functools
from typing import Any

from etils import epath

from data_pipelines.source import ClipSource
from dicetalk_jax.errors import ConfigError


def train_and_val(config: Any, data_dir: epath.Path) -> tuple[ClipSource, ClipSource]:
  """Opens the training and validation clips of `config.data`.

  `dataset='synthetic'` is generated under `data_dir` where it is missing; any other value is the folder of a
  prepared data set.
  """
  return _open(config.data.dataset, config.data.get('synthetic'), str(data_dir))


def _open(dataset: str, settings: Any, data_dir: str) -> tuple[ClipSource, ClipSource]:
  if dataset == 'synthetic':
    if settings is None:
      raise ConfigError("config.data.dataset='synthetic' needs config.data.synthetic, as in the preset 'tiny'; "
                        'or name the folder of a prepared data set')
    folder = _prepare(data_dir, tuple(settings.to_dict().items()))
  else:
    folder = dataset
  return ClipSource(folder, 'train'), ClipSource(folder, 'val')


@functools.cache
def _prepare(data_dir: str, settings: tuple[tuple[str, Any], ...]):
  from data_pipelines.builders.synthetic import SyntheticConfig, prepare_synthetic  # TFDS takes seconds to import
  return prepare_synthetic(data_dir, SyntheticConfig(**dict(settings)))


def provenance(task: Any) -> dict[str, Any]:
  """What a trained component says of its origin in `bundle.json`."""
  c = task.config
  return {'source': f'trained by dicetalk_jax.main, task {task.name}', 'steps': c.total_steps, 'seed': c.seed,
          'data': c.data.dataset, 'init_from': c.init_from}

"""Where a task's clips and first weights come from, and what it tells about itself
in the model folder.
"""

import functools
from typing import Any

from etils import epath
import jax.numpy as jnp

from data_pipelines.loader import Part
from data_pipelines.source import ClipSource
from dicetalk_jax import bundle
from dicetalk_jax.errors import ConfigError, WeightsError
from dicetalk_jax.models.core import Abstract, Params
from dicetalk_jax.models.unet import init_adapters_from_image


def train_and_val(config: Any, data_dir: epath.Path) -> tuple[list[Part], list[Part]]:
  """Opens the training and validation clips of the data sets of `config.data`, with
  their weights.

  `dataset` names one data set or several: `A` or `A=0.5,B=0.25,C=0.25`. Each is the
  folder of a prepared data set, or 'synthetic', which is generated under `data_dir`
  where it is missing.

  Raises:
    ConfigError: a weight is no positive number, or the settings of 'synthetic' are
      missing.
  """
  folders = {}
  for entry in config.data.dataset.split(','):
    name, _, weight = entry.strip().partition('=')
    try:
      share = float(weight or 1)
    except ValueError:
      share = 0.0
    if not name or not 0 < share < float('inf') or name in folders:
      raise ConfigError(
        f'config.data.dataset={config.data.dataset!r} is not understood at {entry!r}; '
        'write FOLDER, or FOLDER=WEIGHT,FOLDER=WEIGHT with positive weights'
      )
    folders[name] = share
  opened = [
    (_folder(name, config.data.get('synthetic'), str(data_dir)), share)
    for name, share in folders.items()
  ]
  train, val = (
    [Part(ClipSource(folder, split), weight=share) for folder, share in opened]
    for split in ('train', 'val')
  )
  return train, val


def _folder(dataset: str, settings: Any, data_dir: str):
  if dataset != 'synthetic':
    return dataset
  if settings is None:
    raise ConfigError(
      "config.data.dataset='synthetic' needs config.data.synthetic, as in the preset "
      "'tiny'; or name the folder of a prepared data set"
    )
  return _prepare(data_dir, tuple(settings.to_dict().items()))


@functools.cache
def _prepare(data_dir: str, settings: tuple[tuple[str, Any], ...]):
  from data_pipelines.builders.synthetic import (
    SyntheticConfig,
    prepare_synthetic,
  )  # TFDS takes seconds to import

  return prepare_synthetic(data_dir, SyntheticConfig(**dict(settings)))


def initial(config: Any, name: str, target: Abstract, shardings: Any = None) -> Params:
  """A component of `config.init_from`, in float32 however it was saved: small updates
  would vanish in less.

  Args:
    config: see `configs/common.py`.
    name: of the component, and of its section in `config`.
    target: its parameters under `config`. Adapters that a UNet lacks begin as the
      image's projections.
    shardings: as in `bundle.load_component`.

  Raises:
    WeightsError: see `bundle.load_component`; or its parameters have other names or
      shapes than those of `target`.
  """
  folder = config.init_from
  part = bundle.load_component(folder, name, shardings, jnp.float32)[1]
  if name == 'unet':
    part = (
      init_adapters_from_image({k: None for k in target if '.processor.' in k} | part)
      | part
    )
  for key in sorted(part.keys() | target.keys()):
    theirs, ours = ((x[key].shape if key in x else 'absent') for x in (part, target))
    if theirs != ours:
      raise WeightsError(
        f"{folder} has another {name} than the configuration: '{key}' is {theirs} "
        f'there and {ours} here; change config.{name} or choose another '
        'config.init_from'
      )
  return part


def provenance(task: Any) -> dict[str, Any]:
  """What a trained component says of its origin in `bundle.json`."""
  c = task.config
  return {
    'source': f'trained by dicetalk_jax.main, task {task.name}',
    'steps': c.total_steps,
    'seed': c.seed,
    'data': c.data.dataset,
    'init_from': c.init_from,
  }

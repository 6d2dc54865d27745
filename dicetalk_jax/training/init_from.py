"""Initial weights of a task (`config.init_from`), and the origin that it records."""

from typing import Any

import jax.numpy as jnp

from dicetalk_jax import bundle
from dicetalk_jax.errors import ConfigError, WeightsError
from dicetalk_jax.models.parameters import Abstract, Params
from dicetalk_jax.models.unet import init_adapters_from_image

RANDOM = 'random'  # in place of a folder


def folder(config: Any, name: str) -> str:
  """Returns the model folder with initial weights, or '' for random ones.

  Args:
    config: see `configs/common.py`.
    name: of the component that the folder must have.

  Raises:
    ConfigError: neither a folder nor random weights are asked for.
    WeightsError: the folder is not a model folder, or has no such component, which
      would be drawn at random without a word.
  """
  if not config.init_from:
    raise ConfigError(
      f'config.init_from is missing, and the {name} would start from random weights; '
      'name a model folder that has one, such as --config.init_from=models/svd (python '
      '-m convert svd FOLDER models/svd makes it from SVD-XT-1.1), or ask for random '
      f'weights by --config.init_from={RANDOM}'
    )
  if config.init_from == RANDOM:
    return ''
  bundle.require(config.init_from, name)
  return config.init_from


def load_initial(
  config: Any, name: str, target: Abstract, shardings: Any = None
) -> Params:
  """Loads a component of `config.init_from` in float32, however it was saved: small
  updates would vanish in a narrower type.

  Args:
    config: see `configs/common.py`.
    name: of the component, and of its section in `config`.
    target: its parameters under `config`. Adapters that a UNet lacks begin as copies of
      the projections of the image.
    shardings: as in `bundle.load_component`.

  Raises:
    WeightsError: see `bundle.load_component`; or its parameters have other names or
      shapes than those of `target`.
  """
  source = config.init_from
  _, params = bundle.load_component(source, name, shardings, jnp.float32)
  if name == 'unet':
    adapters: dict[str, Any] = {key: None for key in target if '.processor.' in key}
    params = init_adapters_from_image(adapters | params) | params
  for key in sorted(params.keys() | target.keys()):
    theirs = params[key].shape if key in params else 'absent'
    ours = target[key].shape if key in target else 'absent'
    if theirs != ours:
      raise WeightsError(
        f"{source} has another {name} than the configuration: '{key}' is {theirs} "
        f'there and {ours} here; change config.{name} or choose another '
        'config.init_from'
      )
  return params


def provenance(task: Any) -> dict[str, Any]:
  """Returns the origin of a trained component, as `bundle.json` records it."""
  config = task.config
  return {
    'source': f'trained by dicetalk_jax.main, task {task.name}',
    'steps': config.total_steps,
    'seed': config.seed,
    'data': config.data.dataset,
    'init_from': config.init_from,
  }

"""Initial weights of a task (`config.init_from`), and the origin that it records."""

from typing import Any

import jax.numpy as jnp

from dicetalk_jax import bundle
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.models.parameters import Abstract, Params
from dicetalk_jax.models.unet import init_adapters_from_image


def load_initial(
  config: Any, name: str, target: Abstract, shardings: Any = None
) -> Params:
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

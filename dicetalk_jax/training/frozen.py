"""Frozen networks: restored from the model folder. They take no part in the training
step and stay on one device, outside its mesh; what they say about the clips is computed
once (`data_pipelines/compute.py`).
"""

from collections.abc import Mapping
from typing import Any

import jax

from dicetalk_jax import bundle
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.models import core, registry
from dicetalk_jax.network import Network


def ensure(folder, name: str, random: Mapping[str, Any] | None, seed: int) -> Network:
  """The component of the model folder; where it has none, a random one of configuration
  `random` is put there.

  Random towers serve the tiny synthetic models only: no published weights exist at that
  size.

  Raises:
    WeightsError: the folder has no such component and `random` is None.
  """
  if name not in bundle.components(folder):
    if random is None:
      raise WeightsError(
        f'{folder} has no {name}; name a model folder that has one with --config.model '
        '(python -m convert makes one from the published weights)'
      )
    config = registry.config_of(name, random).to_json()
    params = core.init_params(registry.builder(name, config), jax.random.key(seed))
    bundle.save_component(
      folder, name, config, params, {'source': f'random, seed {seed}'}
    )
  return Network.load(folder, name)

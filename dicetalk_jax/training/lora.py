"""Low-rank adaptation (LoRA, arXiv 2106.09685): kernels stay as they are, and products
of two thin matrices are added.

The factors are parameters `<kernel>.lora_a` `[fan in, rank]` and `<kernel>.lora_b`
`[rank, fan out]` next to the kernels. They are merged before a task sees any parameter,
so tasks, exported models and sampling know nothing of them.
"""

from collections.abc import Mapping
import os
import re
from typing import Any
import zlib

import numpy as np

from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.parameters import Params
from dicetalk_jax.training.gathering import gather

A = '.lora_a'
B = '.lora_b'


def extended(params: Params, config: Any) -> Params:
  """Adds the factors of every kernel that `config.lora.targets` match.

  The product begins at zero, since `lora_b` does. With `config.lora.rank` 0 nothing is
  added.

  Raises:
    ConfigError: a target matches no kernel.
  """
  rank = config.lora.rank
  if not rank:
    return params
  out: dict[str, Any] = dict(params)
  kernels = [name for name in params if name.endswith('kernel')]
  for pattern in config.lora.targets:
    matching = [name for name in kernels if re.search(pattern, name)]
    if not matching:
      raise ConfigError(
        f"config.lora.targets: '{pattern}' matches no kernel; names look like "
        f"'{min(kernels)}'"
      )
    for name in matching:
      *fan_in, fan_out = params[name].shape
      rows = int(np.prod(fan_in))
      rng = np.random.default_rng([config.seed, zlib.crc32(name.encode())])
      out[name + A] = rng.normal(size=(rows, rank), scale=rows**-0.5).astype(np.float32)
      out[name + B] = np.zeros((rank, fan_out), np.float32)
  return out


def patterns(config: Any) -> tuple[str, ...]:
  """Returns what is trained: `config.trainable`, and the factors if there are any."""
  if not config.lora.rank:
    return tuple(config.trainable)
  return (*config.trainable, r'\.lora_[ab]$')


def check_start(config: Any, model_dir: os.PathLike) -> None:
  """Refuses to read frozen kernels from the folder into which merged ones are written.

  Every start of a run reads them again and merges the checkpoint's factors into them.

  Raises:
    ConfigError: there are factors, and `config.init_from` is the model folder.
  """
  if not config.lora.rank or not config.init_from:
    return
  if os.path.realpath(config.init_from) == os.path.realpath(model_dir):
    raise ConfigError(
      f'config.init_from={config.init_from} is the model folder that the run writes '
      f'to: with config.lora.rank={config.lora.rank} a resumed run would add its '
      'factors twice; choose another --workdir'
    )


def check(trained: Mapping[str, Any], config: Any) -> None:
  """Raises ConfigError if a kernel and its factors would both be trained."""
  both = [name for name in trained if name + A in trained]
  if both:
    raise ConfigError(
      f'config.lora.targets and config.trainable={config.trainable} both train '
      f"{len(both)} kernels, such as '{both[0]}'; remove them from one of the two"
    )


def merged(params: Params, config: Any) -> Params:
  """Merges the factors into their kernels: `kernel + alpha / rank * a @ b`."""
  out = {name: x for name, x in params.items() if not name.endswith((A, B))}
  for name in params:
    if not name.endswith(A):
      continue
    kernel = name.removesuffix(A)
    # Each device computes the slice of the product that it adds to its slice of the
    # kernel.
    product = gather(params[kernel + A]) @ gather(params[kernel + B])
    scaled = config.lora.alpha / config.lora.rank * product
    out[kernel] = out[kernel] + scaled.reshape(out[kernel].shape)
  return out

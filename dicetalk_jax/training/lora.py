"""Low-rank adaptation (LoRA, arXiv 2106.09685): kernels stay as they are, products of
two thin matrices are added.

The factors are parameters `<kernel>.lora_a` `[fan in, rank]` and `<kernel>.lora_b`
`[rank, fan out]` beside the kernels. They are merged before a task sees any parameter,
so tasks, exported models and sampling know nothing of them.
"""

import os
import re
from typing import Any
import zlib

import numpy as np

from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.parameters import Params

A, B = '.lora_a', '.lora_b'


def extended(params: Params, config: Any) -> Params:
  """The parameters and, if `config.lora.rank` is not 0, the factors of every kernel
  that `config.lora.targets` match.

  The product begins at zero, since `lora_b` does.

  Raises:
    ConfigError: a target matches no kernel.
  """
  rank, out = config.lora.rank, dict(params)
  for pattern in config.lora.targets if rank else ():
    kernels = [
      name for name in params if name.endswith('kernel') and re.search(pattern, name)
    ]
    if not kernels:
      raise ConfigError(
        f"config.lora.targets: '{pattern}' matches no kernel; names look like "
        f"'{min(name for name in params if name.endswith('kernel'))}'"
      )
    for name in kernels:
      *fan_in, fan_out = params[name].shape
      rows = int(np.prod(fan_in))
      rng = np.random.default_rng([config.seed, zlib.crc32(name.encode())])
      out[name + A] = rng.normal(size=(rows, rank), scale=rows**-0.5).astype(np.float32)
      out[name + B] = np.zeros((rank, fan_out), np.float32)
  return out


def patterns(config: Any) -> tuple[str, ...]:
  """`config.trainable`, and the factors."""
  return (*config.trainable, *([r'\.lora_[ab]$'] if config.lora.rank else []))


def check_start(config: Any, model_dir: os.PathLike) -> None:
  """Refuses to take the kernels that are held from where merged ones are written.

  Every start of a run reads them again and merges the checkpoint's factors into them.

  Raises:
    ConfigError: there are factors, and `config.init_from` is the model folder.
  """
  if (
    config.lora.rank
    and config.init_from
    and os.path.realpath(config.init_from) == os.path.realpath(model_dir)
  ):
    raise ConfigError(
      f'config.init_from={config.init_from} is the model folder that the run writes '
      f'to: with config.lora.rank={config.lora.rank} a resumed run would add its '
      'factors twice; choose another --workdir'
    )


def check(trained: Params, config: Any) -> None:
  """Raises ConfigError where a kernel is trained itself as well as by its factors."""
  if both := [name for name in trained if name + A in trained]:
    raise ConfigError(
      f'config.lora.targets and config.trainable={config.trainable} both train '
      f"{len(both)} kernels, such as '{both[0]}'; train them either way"
    )


def merged(params: Params, config: Any) -> Params:
  """The parameters without factors: `kernel + alpha / rank * a @ b`."""
  out = {name: x for name, x in params.items() if not name.endswith((A, B))}
  for name in (name.removesuffix(A) for name in params if name.endswith(A)):
    product = params[name + A] @ params[name + B]
    out[name] = out[name] + (config.lora.alpha / config.lora.rank * product).reshape(
      out[name].shape
    )
  return out

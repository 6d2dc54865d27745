"""Draws the weights of small golden modules by a rule, which saves megabytes of files.

The published class is constructed with PyTorch's seeded generator. Then normal noise is
added to every parameter, so that nothing stays zero or one. This needs diffusers, and
the PyTorch version whose generator drew the weights: 2.13.0.
"""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np
import torch

from dicetalk_jax.errors import InputError

CLASSES = ('AutoencoderKLTemporalDecoder', 'UNetSpatioTemporalConditionModel')
REMEDY = "pip install -e '.[test]' adds the versions that drew them"


def draw(meta: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
  """Draws the weights of a description, by published key.

  Args:
    meta: the description, with the keys `constructor`, `seed` and `drawn`. The latter
      names the class of diffusers and gives the `projection` of the weights.
    name: of the weights, for messages.

  Raises:
    InputError: diffusers is missing, or the installed versions draw other numbers.
  """
  rule = meta['drawn']
  if rule['class'] not in CLASSES:
    raise InputError(
      f'{name} cannot be drawn from {rule["class"]}, only from {" and ".join(CLASSES)}'
    )
  try:
    import diffusers
  except ModuleNotFoundError:
    raise InputError(
      f'{name} are drawn with diffusers, which is missing; {REMEDY}'
    ) from None
  with torch.random.fork_rng(devices=[]), torch.no_grad():
    torch.manual_seed(meta['seed'])
    module = getattr(diffusers, rule['class'])(**meta['constructor'])
    noise = torch.Generator().manual_seed(meta['seed'] + 1)
    initial = dict(module.named_parameters())
    initial |= _adapters(initial, len(meta.get('adapter_tokens', ())))
    weights = {
      key: _with_noise(key, initial[key], noise).numpy() for key in sorted(initial)
    }
  # Without AVX2, PyTorch's normal numbers differ in the last bits (2e-7 at most here),
  # which a hash would refuse.
  found = projection(weights)
  if not math.isclose(found, rule['projection'], abs_tol=1e-3):
    raise InputError(
      f'{name} come out differently with PyTorch {torch.__version__} and diffusers '
      f'{diffusers.__version__} (projection {found:.4f} instead of '
      f'{rule["projection"]:.4f}); {REMEDY}'
    )
  return weights


def projection(weights: Mapping[str, np.ndarray]) -> float:
  """Projects all weights on the cosines of 0, 1, 2, ...: one wrong number shows.

  The weights are in the order of their sorted keys.
  """
  x = np.concatenate([weights[key].ravel() for key in sorted(weights)]).astype(
    np.float64
  )
  return float(x @ np.cos(np.arange(len(x))))


def _adapters(
  initial: Mapping[str, torch.Tensor], count: int
) -> dict[str, torch.Tensor]:
  """Gives `count` adapters copies of the keys and values for the image."""
  copies = {}
  for key, value in initial.items():
    for letter in 'kv':
      layer, found, _ = key.partition(f'attn2.to_{letter}.weight')
      if not found:
        continue
      for i in range(count):
        copies[f'{layer}attn2.processor.to_{letter}_ip.{i}.weight'] = value
  return copies


def _with_noise(key: str, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
  noise = torch.randn(x.shape, generator=generator)
  if key.endswith('mix_factor'):
    return 0.8 * noise
  if x.ndim == 1:
    return x + 0.1 * noise
  return x + noise * (0.3 / math.sqrt(x[0].numel()))

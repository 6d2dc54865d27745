"""Weights of small golden modules that follow from a rule, in place of megabytes of
random numbers.

The published class is constructed with PyTorch's seeded generator; then normal noise is
added to every parameter, so that nothing stays zero or one. Needs diffusers, and the
PyTorch whose generator drew them: 2.13.0.
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
  """The weights of a description with the keys `constructor`, `seed` and `drawn`, by
  published key.

  `drawn` names the class of diffusers and gives the `projection` of the weights.

  Args:
    meta: the description.
    name: what a message calls the weights.

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
      key: _lively(key, initial[key], noise).numpy() for key in sorted(initial)
    }
  # Without AVX2, PyTorch's normal numbers differ in the last bits (2e-7 at most here),
  # which a hash would refuse.
  if not math.isclose(found := projection(weights), rule['projection'], abs_tol=1e-3):
    raise InputError(
      f'{name} come out differently with PyTorch {torch.__version__} and diffusers '
      f'{diffusers.__version__} (projection {found:.4f} instead of '
      f'{rule["projection"]:.4f}); {REMEDY}'
    )
  return weights


def projection(weights: Mapping[str, np.ndarray]) -> float:
  """All weights, in the order of sorted keys, times the cosines of 0, 1, 2, ...: one
  wrong number shows.
  """
  x = np.concatenate([weights[key].ravel() for key in sorted(weights)]).astype(
    np.float64
  )
  return float(x @ np.cos(np.arange(len(x))))


def _adapters(
  initial: Mapping[str, torch.Tensor], count: int
) -> dict[str, torch.Tensor]:
  """Keys and values of `count` adapters begin as copies of the image's."""
  return {
    f'{layer}attn2.processor.to_{x}_ip.{i}.weight': value
    for key, value in initial.items()
    for x in 'kv'
    for layer, source, _ in [key.partition(f'attn2.to_{x}.weight')]
    if source
    for i in range(count)
  }


def _lively(key: str, p: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
  n = torch.randn(p.shape, generator=noise)
  if key.endswith('mix_factor'):
    return 0.8 * n
  return p + (0.1 * n if p.ndim == 1 else n * (0.3 / math.sqrt(p[0].numel())))

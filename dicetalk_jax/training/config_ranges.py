"""Numbers that a configuration may have, and what else can be told from one value."""

from collections.abc import Iterable
import math
import re
from typing import Any, NamedTuple

from dicetalk_jax.errors import ConfigError

# Sections of components, whose integers are sizes and counts.
COMPONENTS = (
  'vae',
  'embedder',
  'unet',
  'audio_linear',
  'pose_guider',
  'emo_model',
  'frozen.whisper',
  'frozen.image_encoder',
)


class Range(NamedTuple):
  """Numbers from `low` to `high`; `low` itself only if it is not `above`."""

  low: float
  high: float = math.inf
  above: bool = False

  def __contains__(self, value: object) -> bool:
    if not isinstance(value, int | float):
      return False
    return self.low <= value <= self.high and not (self.above and value == self.low)

  def __str__(self) -> str:
    text = f'more than {self.low:g}' if self.above else f'at least {self.low:g}'
    return text if self.high == math.inf else f'{text} and at most {self.high:g}'


NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
SHARE = Range(0, 1)

# By dotted key; a key that a task does not have is passed over.
RANGES = {
  'seed': NOT_NEGATIVE,
  'data.workers': NOT_NEGATIVE,
  'optim.lr': NOT_NEGATIVE,
  'optim.eps': NOT_NEGATIVE,
  'optim.weight_decay': NOT_NEGATIVE,
  'optim.clip': NOT_NEGATIVE,
  'optim.warmup': NOT_NEGATIVE,
  'optim.end_lr': NOT_NEGATIVE,
  'optim.ema': SHARE,
  'optim.new_module_lr_mult': NOT_NEGATIVE,
  'data.frames': Range(1),
  'data.step': Range(1),
  'data.size': Range(8),
  'data.videos': NOT_NEGATIVE,
  'vae.scaling_factor': POSITIVE,
  'embedder.dropout': SHARE,
  'embedder.max_len': Range(1),
  'emo_model.dropout': SHARE,
  'emotion.bank_decay': SHARE,
  'emotion.p_whole_bank': SHARE,
  'loss.mse': NOT_NEGATIVE,
  'loss.kl': NOT_NEGATIVE,
  'loss.tau': POSITIVE,
  'loss.lambda_cls': NOT_NEGATIVE,
  'loss.lambda_vq': NOT_NEGATIVE,
  'loss.cls_warmup': NOT_NEGATIVE,
  'loss.face_weight': NOT_NEGATIVE,
  'loss.mouth_weight': NOT_NEGATIVE,
  'noise.p_std': POSITIVE,
  'noise.sigma_min': POSITIVE,
  'noise.sigma_max': POSITIVE,
  'sample.num_steps': Range(1),
  'sample.overlap': NOT_NEGATIVE,
  'sample.sigma_max': POSITIVE,
}


def check(config: Any) -> None:
  """Checks all numbers and patterns of a configuration.

  Raises:
    ConfigError: names the value, and those that work.
  """
  for key, wanted in RANGES.items():
    value = _lookup(config, key)
    if value is not None and value not in wanted:
      raise ConfigError(f'config.{key}={value} must be {wanted}')
  for section in COMPONENTS:
    for name, value in (_lookup(config, section) or {}).items():
      if value == ():
        raise ConfigError(
          f'config.{section}.{name} is empty; start from its value in configs/'
        )
      if any(number < 0 for number in _integers(value)):
        raise ConfigError(
          f'config.{section}.{name}={value} is a size or a count; make it at least 1'
        )
  for key in ('trainable', 'lora.targets'):
    for pattern in _lookup(config, key) or ():
      _check_pattern(key, pattern)


def _integers(value: Any) -> Iterable[int]:
  values = value if isinstance(value, tuple | list) else (value,)
  return [number for number in values if isinstance(number, int)]


def _check_pattern(key: str, pattern: str) -> None:
  try:
    re.compile(pattern)
  except re.error as error:
    raise ConfigError(
      f'config.{key} has {pattern!r}, which is not a regular expression ({error}); '
      'escape special characters with a backslash'
    ) from error


def _lookup(config: Any, key: str) -> Any:
  """The value of a dotted key; None if it, or its section, is not there."""
  for name in key.split('.'):
    config = config.get(name)
    if config is None:
      return None
  return config

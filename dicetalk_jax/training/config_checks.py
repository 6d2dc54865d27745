"""Combinations of settings that cannot work or that would do nothing, refused before
anything is computed.
"""

from collections.abc import Collection, Mapping
from typing import Any

from dicetalk_jax.data.clip_record import CLASSES
from dicetalk_jax.diffusion.condition_dropout import CASES
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.unet import REMAT
from dicetalk_jax.training.contrastive import OTHER_PEOPLE, SIMILARITIES

DIFFUSION = {
  'data.buckets': ('measured', 'fixed'),
  'noise.ref_aug': ('none', 'lognormal'),
  'loss.cls_pool': ('frame', 'clip'),
  'remat': tuple(REMAT),
  'emotion.bank_init': ('kmeans', 'uniform'),
  'emotion.emo_ref': ('same_clip', 'other_clip'),
}
EMBEDDER = {'loss.similarity': SIMILARITIES, 'loss.other_people': OTHER_PEOPLE}


def diffusion(config: Any) -> None:
  """Raises ConfigError with the reason; `config` as in `configs/diffusion.py`."""
  c, emotion = config, 'emo_model' in config
  _choices(c, DIFFUSION)
  _rates(c.drop, CASES)
  for key in ('frames', 'step', 'clip_stride'):
    if c.data[key] < 1:
      raise ConfigError(f'config.data.{key}={c.data[key]} must be at least 1')
  area = c.data.area
  if len(area) != 2 or not 0 < area[0] <= area[1]:
    raise ConfigError(
      f'config.data.area={area} must be two positive numbers, the smaller one first'
    )
  if c.unet.projection_class_embeddings_input_dim != 3 * c.unet.addition_time_embed_dim:
    raise ConfigError(
      f'config.unet.projection_class_embeddings_input_dim={c.unet.projection_class_embeddings_input_dim} '
      'must be 3 times '
      f'config.unet.addition_time_embed_dim={c.unet.addition_time_embed_dim}: frame '
      'rate and two amounts of motion'
    )
  if c.unet.adapters != 1 + emotion:
    raise ConfigError(
      f'config.unet.adapters={c.unet.adapters} {"with" if emotion else "without"} '
      f'config.emo_model: audio{" and emotion need" if emotion else " alone needs"} '
      f'{1 + emotion}; set it to that'
    )
  if not emotion:
    if c.loss.lambda_cls:
      raise ConfigError(
        f'config.loss.lambda_cls={c.loss.lambda_cls}, but without config.emo_model '
        'there is no classifier; set it to 0'
      )
    return
  if c.loss.lambda_cls and c.emo_model.num_classes != CLASSES:
    raise ConfigError(
      f'config.emo_model.num_classes={c.emo_model.num_classes}, but clips are labelled '
      f'with {CLASSES} classes; set it to that, or config.loss.lambda_cls to 0'
    )
  if c.emotion.restart < 0:
    raise ConfigError(
      f'config.emotion.restart={c.emotion.restart} must be a number of steps, or 0 for '
      'never'
    )
  if c.emo_model.mode != 'bank':
    for key in ('restart', 'p_whole_bank'):
      if value := c.emotion[key]:
        raise ConfigError(
          f"config.emotion.{key}={value} needs config.emo_model.mode='bank', but there "
          f"is no bank in mode '{c.emo_model.mode}'; set it to 0"
        )
  elif (
    c.emotion.bank_init == 'uniform'
    and c.emo_model.stop_fc_grad
    and not c.emotion.restart
  ):
    raise ConfigError(
      "config.emotion.bank_init='uniform' with config.emo_model.stop_fc_grad and "
      'without config.emotion.restart: all priors would share one code for ever, as '
      'neither projection nor unused codes move; set restart=100 or one of the other '
      'two back'
    )


def embedder(config: Any) -> None:
  """Raises ConfigError with the reason; `config` as in `configs/embedder.py`."""
  _choices(config, EMBEDDER)
  _rates(config.drop, ('video', 'audio'))
  shortest, longest = config.data.min_len, config.data.max_len
  if not 1 <= shortest <= longest:
    raise ConfigError(
      f'config.data.min_len={shortest} and config.data.max_len={longest} are the '
      'shortest and the longest window in frames; make the first at least 1 and at '
      'most the second'
    )
  if config.accum != 1:
    raise ConfigError(
      f'config.accum={config.accum}: the contrastive loss compares all clips of a '
      'batch, and micro-batches would hide them from each other; set it to 1, and use '
      'more devices or a smaller batch'
    )
  only = config.embedder.modalities
  if only in ('video', 'audio') and sum(config.drop.values()):
    raise ConfigError(
      f"config.embedder.modalities='{only}' with config.drop={config.drop.to_dict()}: "
      'the only modality cannot be dropped; set both rates to 0'
    )
  if config.embedder.visual == 'crops':
    for key, value, reason in (
      ('modalities', 'audio', 'the crops would never be seen'),
      ('expr_norm', 'zscore', 'there are no expression coefficients to standardise'),
    ):
      if config.embedder[key] == value:
        raise ConfigError(
          f"config.embedder.{key}='{value}' with config.embedder.visual='crops': "
          f'{reason}; set one of the two back'
        )


def _choices(config: Any, known: Mapping[str, tuple[str, ...]]) -> None:
  for key, choices in known.items():
    section, _, name = key.rpartition('.')
    values = config.get(section, {}) if section else config
    if name in values and (value := values[name]) not in choices:
      raise ConfigError(
        f'config.{key}={value!r} is unknown; choose one of: {", ".join(choices)}'
      )


def _rates(drop: Mapping[str, float], cases: Collection[str]) -> None:
  if set(drop) != set(cases):
    raise ConfigError(
      f'config.drop={dict(drop)} must have these probabilities: {", ".join(cases)}'
    )
  if min(drop.values()) < 0 or sum(drop.values()) > 1:
    raise ConfigError(
      f'config.drop={dict(drop)} are probabilities of cases that exclude each other; '
      'make them at least 0 and their sum at most 1'
    )

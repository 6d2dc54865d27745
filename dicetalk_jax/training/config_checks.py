"""Checks of what a configuration alone can get wrong: unknown values, and combinations
that cannot work or that would do nothing.

They run before anything is computed. What depends on data or on a model folder is
checked by the tasks.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from flax import nnx

from dicetalk_jax.data import diffusion_loader
from dicetalk_jax.data.clip_record import CLASSES
from dicetalk_jax.diffusion.condition_dropout import CASES
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models import embedder as embedder_model
from dicetalk_jax.models import emotion as emotion_model
from dicetalk_jax.models import parameters, registry
from dicetalk_jax.models.unet import REMAT
from dicetalk_jax.training import config_ranges, contrastive, optimizer

# Legal values by dotted key. The comments in configs/ repeat them for the reader.
CHOICES: dict[str, tuple[str, ...]] = {
  'dtype': ('bfloat16', 'float32', 'float16'),
  'optim.name': optimizer.NAMES,
  'optim.schedule': optimizer.SCHEDULES,
}
DIFFUSION_CHOICES: dict[str, tuple[str, ...]] = {
  'data.reference': diffusion_loader.REFERENCE_SOURCES,
  'data.buckets': ('measured', 'fixed'),
  'emotion.emo_ref': tuple(
    name for name in diffusion_loader.PRIOR_SOURCES if name != 'none'
  ),
  'emotion.bank_init': ('kmeans', 'uniform'),
  'noise.ref_aug': ('none', 'lognormal'),
  'loss.cls_pool': ('frame', 'clip'),
  'remat': tuple(REMAT),
  **{f'emo_model.{key}': values for key, values in emotion_model.CHOICES.items()},
}
EMBEDDER_CHOICES: dict[str, tuple[str, ...]] = {
  'loss.similarity': contrastive.SIMILARITIES,
  'loss.other_people': contrastive.OTHER_PEOPLE,
  **{f'embedder.{key}': values for key, values in embedder_model.CHOICES.items()},
}


def loop(config: Any) -> None:
  """Checks what the loop reads; `config` as in `configs/common.py`.

  Raises:
    ConfigError: a count is not positive, or a value is unknown.
  """
  _check_choices(config, CHOICES)
  config_ranges.check(config)
  for key in ('total_steps', 'log_every', 'eval_every', 'checkpoint_every', 'keep'):
    _check_positive(config, key)
  if config.lora.rank < 0:
    raise ConfigError(
      f'config.lora.rank={config.lora.rank} must be at least 1, or 0 for no factors'
    )


def structure(
  config: Any, name: str
) -> tuple[Callable[..., nnx.Module], nnx.GraphDef, parameters.Abstract]:
  """Builds a component in the abstract.

  Args:
    config: the whole configuration.
    name: of the component.

  Returns:
    The function that builds it, and its structure and parameters.

  Raises:
    ConfigError: its configuration does not make a model.
  """
  try:
    build = registry.builder(name, config[name].to_dict(), config.dtype)
    return build, *parameters.abstract(build)
  except (TypeError, ValueError, IndexError, ArithmeticError) as error:
    cause = str(error).partition('\n')[0]
    raise ConfigError(
      f'config.{name} does not make a model ({cause}); start from the values in '
      'configs/'
    ) from error


def diffusion(config: Any) -> None:
  """Checks the diffusion task; `config` as in `configs/diffusion.py`.

  Raises:
    ConfigError: with the reason.
  """
  _check_choices(config, DIFFUSION_CHOICES)
  _check_rates(config.drop, CASES)
  for key in ('data.frames', 'data.step', 'data.clip_stride'):
    _check_positive(config, key)
  area = config.data.area
  if len(area) != 2 or not 0 < area[0] <= area[1]:
    raise ConfigError(
      f'config.data.area={area} must be two positive numbers, the smaller one first'
    )
  if config.fused_kernels and config.dtype == 'float32':
    raise ConfigError(
      'config.fused_kernels=True, but there is no such kernel for '
      "config.dtype='float32'; set it to False, or the type to 'bfloat16' or 'float16'"
    )
  _check_unet(config)
  if 'emo_model' in config:
    _check_emotion(config)
  elif config.loss.lambda_cls:
    raise ConfigError(
      f'config.loss.lambda_cls={config.loss.lambda_cls}, but without config.emo_model '
      'there is no classifier; set it to 0'
    )
  check_fit(config, _sizes(config))


def embedder(config: Any) -> None:
  """Checks the embedder task; `config` as in `configs/embedder.py`.

  Raises:
    ConfigError: with the reason.
  """
  _check_choices(config, EMBEDDER_CHOICES)
  _check_rates(config.drop, ('video', 'audio'))
  data = config.data
  if not 1 <= data.min_len <= data.max_len:
    raise ConfigError(
      f'config.data.min_len={data.min_len} and config.data.max_len={data.max_len} are '
      'the shortest and the longest window in frames; make the first at least 1 and at '
      'most the second'
    )
  if config.accum != 1:
    raise ConfigError(
      f'config.accum={config.accum}: the contrastive loss compares all clips of a '
      'batch, and micro-batches would hide them from each other; set it to 1, and use '
      'more devices or a smaller batch'
    )
  modalities = config.embedder.modalities
  if modalities != 'both' and sum(config.drop.values()):
    raise ConfigError(
      f"config.embedder.modalities='{modalities}' with "
      f'config.drop={config.drop.to_dict()}: the only modality cannot be dropped; set '
      'both rates to 0'
    )
  if config.embedder.visual == 'crops':
    if modalities == 'audio':
      raise _contradiction("modalities='audio'", 'the crops would never be seen')
    if config.embedder.expr_norm == 'zscore':
      raise _contradiction(
        "expr_norm='zscore'", 'there are no expression coefficients to standardise'
      )
  windows = (data.identities * data.emotions + data.videos) * data.clips
  if config.batch_size != windows:
    raise ConfigError(
      f'config.batch_size={config.batch_size}, but the groups of config.data make '
      f'{windows} windows (identities x emotions x clips + videos x clips); set it to '
      'that'
    )


def check_fit(config: Any, sizes: Mapping[str, int]) -> None:
  """Checks that components fit together.

  Args:
    config: the whole configuration.
    sizes: dotted key to the value that the other components need.

  Raises:
    ConfigError: a size differs.
  """
  for key, needed in sizes.items():
    value = _lookup(config, key)
    if value != needed:
      raise ConfigError(
        f'config.{key}={value} does not fit the other components, which need {needed}; '
        'set it to that'
      )


def _check_unet(config: Any) -> None:
  unet = config.unet
  if unet.projection_class_embeddings_input_dim != 3 * unet.addition_time_embed_dim:
    raise ConfigError(
      'config.unet.projection_class_embeddings_input_dim='
      f'{unet.projection_class_embeddings_input_dim} must be 3 times '
      f'config.unet.addition_time_embed_dim={unet.addition_time_embed_dim}: frame rate '
      'and two amounts of motion'
    )
  if 'emo_model' in config and unet.adapters != 2:
    raise ConfigError(
      f'config.unet.adapters={unet.adapters} with config.emo_model: audio and emotion '
      'need 2; set it to that'
    )
  if 'emo_model' not in config and unet.adapters != 1:
    raise ConfigError(
      f'config.unet.adapters={unet.adapters} without config.emo_model: audio alone '
      'needs 1; set it to that'
    )


def _check_emotion(config: Any) -> None:
  emotion = config.emotion
  emo_model = config.emo_model
  if emo_model.num_classes != CLASSES:
    raise ConfigError(
      f'config.emo_model.num_classes={emo_model.num_classes}, but clips are labelled '
      f'with {CLASSES} classes; set it to that'
    )
  if emotion.restart < 0:
    raise ConfigError(
      f'config.emotion.restart={emotion.restart} must be a number of steps, or 0 for '
      'never'
    )
  if emo_model.mode != 'bank':
    for key in ('restart', 'p_whole_bank'):
      if emotion[key]:
        raise ConfigError(
          f"config.emotion.{key}={emotion[key]} needs config.emo_model.mode='bank', "
          f"but there is no bank in mode '{emo_model.mode}'; set it to 0"
        )
  elif (
    emotion.bank_init == 'uniform' and emo_model.stop_fc_grad and not emotion.restart
  ):
    raise ConfigError(
      "config.emotion.bank_init='uniform' with config.emo_model.stop_fc_grad and "
      'without config.emotion.restart would map every prior to the same code for good; '
      "set restart=100, or bank_init='kmeans', or stop_fc_grad=False"
    )


def _sizes(config: Any) -> dict[str, int]:
  """Sizes that follow from those of the UNet."""
  unet = config.unet
  sizes = {'audio_linear.output_dim': unet.cross_attention_dim}
  if 'pose_guider' in config:
    sizes['pose_guider.conditioning_embedding_channels'] = unet.block_out_channels[0]
  if 'emo_model' in config:
    sizes['emo_model.classifier_in'] = unet.block_out_channels[-1]
    sizes['emo_model.dim'] = unet.cross_attention_dim
  return sizes


def _contradiction(setting: str, reason: str) -> ConfigError:
  return ConfigError(
    f"config.embedder.{setting} with config.embedder.visual='crops': {reason}; change "
    'one of the two'
  )


def _check_choices(config: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
  for key, known in choices.items():
    value = _lookup(config, key, default=known[0])
    if value not in known:
      raise ConfigError(
        f'config.{key}={value!r} is unknown; choose one of: {", ".join(known)}'
      )


def _check_positive(config: Any, key: str) -> None:
  value = _lookup(config, key)
  if value < 1:
    raise ConfigError(f'config.{key}={value} must be at least 1')


def _check_rates(drop: Mapping[str, float], cases: Collection[str]) -> None:
  if set(drop) != set(cases):
    raise ConfigError(
      f'config.drop={dict(drop)} must have these probabilities: {", ".join(cases)}'
    )
  if min(drop.values()) < 0 or sum(drop.values()) > 1:
    raise ConfigError(
      f'config.drop={dict(drop)} must be probabilities of cases that exclude each '
      'other: each at least 0, their sum at most 1'
    )


def _lookup(config: Any, key: str, default: Any = None) -> Any:
  """The value of a dotted key, or `default` if its section has been removed."""
  for name in key.split('.'):
    config = config.get(name)
    if config is None:
      return default
  return config

"""The denoiser: SVD's spatio-temporal UNet with decoupled audio and emotion adapters
(paper equation 14).

Published as `UNetSpatioTemporalConditionModel` plus adapters. Without adapters it is
stock SVD; with one, Sonic.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Real

from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.attention import CrossAttention, KeyValue
from dicetalk_jax.models.layers import GroupNorm, sinusoid
from dicetalk_jax.models.parameters import ModelConfig, Params, strip_prefix
from dicetalk_jax.models.resnet import Conv3x3, SpatioTemporalResBlock
from dicetalk_jax.models.transformer import EmbeddingMLP, SpatioTemporalTransformer
from dicetalk_jax.models.unet_blocks import (
  DownBlock,
  Inputs,
  MakeResnet,
  MakeTransformer,
  MidBlock,
  UpBlock,
)


class Stage(NamedTuple):
  """The properties in which types of stages differ."""

  has_transformers: bool
  epsilon: float  # of the norms of its resnets


STAGES = {
  'CrossAttnDownBlockSpatioTemporal': Stage(True, 1e-6),
  'DownBlockSpatioTemporal': Stage(False, 1e-5),
  'CrossAttnUpBlockSpatioTemporal': Stage(True, 1e-6),
  'UpBlockSpatioTemporal': Stage(False, 1e-6),
}
MIDDLE = Stage(True, 1e-5)


def _keep_all(function: Callable[..., Array]) -> Callable[..., Array]:
  return function


# What the backward pass computes again: nothing; all of each resnet and transformer;
# all of them but products with weights, which take the most time and much of the
# memory.
REMAT: dict[str, Callable[..., Callable[..., Array]]] = {
  'none': _keep_all,
  'block': jax.checkpoint,
  'dots': functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}

ContextKV = Mapping[str, tuple[KeyValue | None, ...]]


@dataclasses.dataclass(frozen=True)
class UNetConfig(ModelConfig):
  """Reads the published `config.json`.

  Tuples have one entry per level; an int stands for all levels.
  """

  in_channels: int = 8
  out_channels: int = 4
  down_block_types: tuple[str, ...] = (
    'CrossAttnDownBlockSpatioTemporal',
    'CrossAttnDownBlockSpatioTemporal',
    'CrossAttnDownBlockSpatioTemporal',
    'DownBlockSpatioTemporal',
  )
  up_block_types: tuple[str, ...] = (
    'UpBlockSpatioTemporal',
    'CrossAttnUpBlockSpatioTemporal',
    'CrossAttnUpBlockSpatioTemporal',
    'CrossAttnUpBlockSpatioTemporal',
  )
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  addition_time_embed_dim: int = 256
  projection_class_embeddings_input_dim: int = 768
  layers_per_block: int | tuple[int, ...] = 2
  cross_attention_dim: int | tuple[int, ...] = 1024
  transformer_layers_per_block: int | tuple[int, ...] = 1
  num_attention_heads: int | tuple[int, ...] = (5, 10, 20, 20)
  num_frames: int = 25
  norm_num_groups: int = 32
  adapters: int = 2  # audio, emotion

  def __post_init__(self) -> None:
    self._check_stages('down_block_types')
    self._check_stages('up_block_types')
    for field in (
      'layers_per_block',
      'cross_attention_dim',
      'transformer_layers_per_block',
      'num_attention_heads',
    ):
      value = getattr(self, field)
      if isinstance(value, tuple) and len(value) != self.levels:
        raise ConfigError(
          f'{field}={value} of the UNet must have {self.levels} entries, as '
          'block_out_channels has, or be one number for all levels'
        )
    for level in range(self.levels):
      self._check_width(level)

  def _check_stages(self, field: str) -> None:
    """Refuses unknown types of stages, and a wrong number of stages."""
    kinds = getattr(self, field)
    for kind in kinds:
      if kind not in STAGES:
        raise ConfigError(
          f'{field} of the UNet has {kind!r}, which is unknown; choose from '
          f'{", ".join(STAGES)}'
        )
    if len(kinds) != self.levels:
      raise ConfigError(
        f'{field} of the UNet has {len(kinds)} entries, but block_out_channels has '
        f'{self.levels}'
      )

  def _check_width(self, level: int) -> None:
    """Refuses a width that groups or heads do not divide."""
    width = self.block_out_channels[level]
    heads = self.at(level, 'num_attention_heads')
    has_attention = (
      STAGES[self.down_block_types[level]].has_transformers
      or STAGES[self.up_block_types[-1 - level]].has_transformers
      or level == self.levels - 1  # the middle stage
    )
    groups_fit = width % self.norm_num_groups == 0
    heads_fit = heads > 0 and width % heads == 0
    if not groups_fit or (has_attention and not heads_fit):
      raise ConfigError(
        f'block_out_channels={self.block_out_channels} of the UNet must be multiples '
        f'of norm_num_groups={self.norm_num_groups} and, where there is attention, '
        f'of num_attention_heads={self.num_attention_heads}'
      )

  @property
  def levels(self) -> int:
    """The number of resolutions."""
    return len(self.block_out_channels)

  def at(self, level: int, field: str) -> int:
    """The value of a per-level field."""
    value: int | tuple[int, ...] = getattr(self, field)
    return value[level] if isinstance(value, tuple) else value


class UNet(nnx.Module):
  """Down, middle and up stages with skip connections, after SVD.

  The output is raw; preconditioning is `diffusion.edm`.
  """

  def __init__(
    self, config: UNetConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    widths = config.block_out_channels
    temb_channels = 4 * widths[0]

    def resnet(stage: Stage) -> MakeResnet:
      return functools.partial(
        SpatioTemporalResBlock,
        groups=config.norm_num_groups,
        epsilon=stage.epsilon,
        temb_channels=temb_channels,
        dtype=dtype,
        rngs=rngs,
      )

    def transformer(level: int) -> MakeTransformer:
      return functools.partial(
        SpatioTemporalTransformer,
        heads=config.at(level, 'num_attention_heads'),
        context_dim=config.at(level, 'cross_attention_dim'),
        layers=config.at(level, 'transformer_layers_per_block'),
        adapters=config.adapters,
        groups=config.norm_num_groups,
        dtype=dtype,
        rngs=rngs,
      )

    # 1. What comes before the stages.
    self.config = config
    self.conv_in = Conv3x3(config.in_channels, widths[0], dtype=dtype, rngs=rngs)
    self.time_embedding = EmbeddingMLP(
      widths[0], temb_channels, temb_channels, dtype=dtype, rngs=rngs
    )
    self.add_embedding = EmbeddingMLP(
      config.projection_class_embeddings_input_dim,
      temb_channels,
      temb_channels,
      dtype=dtype,
      rngs=rngs,
    )

    # 2. Down. Construction walks the same path as the forward pass: `width` is that of
    # x, `skips` holds the widths of the skip tensors.
    width = widths[0]
    skips = [width]
    self.down_blocks: nnx.List[DownBlock] = nnx.List([])
    for level, kind in enumerate(config.down_block_types):
      stage = STAGES[kind]
      layers = config.at(level, 'layers_per_block')
      downsample = level < config.levels - 1
      self.down_blocks.append(
        DownBlock(
          width,
          widths[level],
          layers=layers,
          resnet=resnet(stage),
          transformer=transformer(level) if stage.has_transformers else None,
          downsample=downsample,
          dtype=dtype,
          rngs=rngs,
        )
      )
      width = widths[level]
      skips += [width] * (layers + downsample)

    # 3. Middle.
    self.mid_block = MidBlock(
      width, resnet=resnet(MIDDLE), transformer=transformer(config.levels - 1)
    )

    # 4. Up, from the lowest resolution.
    self.up_blocks: nnx.List[UpBlock] = nnx.List([])
    for level, kind in zip(reversed(range(config.levels)), config.up_block_types):
      stage = STAGES[kind]
      layers = config.at(level, 'layers_per_block') + 1
      self.up_blocks.append(
        UpBlock(
          width,
          widths[level],
          [skips.pop() for _ in range(layers)],
          resnet=resnet(stage),
          transformer=transformer(level) if stage.has_transformers else None,
          upsample=level > 0,
          dtype=dtype,
          rngs=rngs,
        )
      )
      width = widths[level]

    # 5. The output.
    self.conv_norm_out = GroupNorm(
      width, config.norm_num_groups, epsilon=1e-5, dtype=dtype, rngs=rngs
    )
    self.conv_out = Conv3x3(width, config.out_channels, dtype=dtype, rngs=rngs)

  def context_kv(
    self,
    image: Float[Array, 'B _ 1 D'],
    audio: Float[Array, 'B _ _ D'] | None = None,
    emotion: Float[Array, 'B _ _ D'] | None = None,
  ) -> dict[str, tuple[KeyValue | None, ...]]:
    """Computes keys and values of all cross-attentions.

    Call it once per clip, not per step or window. Contexts are `[B,F',S,D]`: F' is the
    number of frames, or 1 if all frames share the context, for each context by itself.

    Args:
      image: the CLIP token; zeros for the unconditional row.
      audio: tokens of adapter 0, or None to leave it out.
      emotion: tokens of adapter 1, or None.

    Returns:
      Name of each attn2 -> keys and values `[B,F',S,C]` of each context; None where a
      context is None.

    Raises:
      ValueError: tokens are given for an adapter that the model does not have.
    """
    contexts = (image, audio, emotion)
    used = contexts[: 1 + self.config.adapters]
    surplus = contexts[1 + self.config.adapters :]
    if any(tokens is not None for tokens in surplus):
      raise ValueError(
        f'the UNet has {self.config.adapters} adapters, but tokens for more were given'
      )
    return {
      '.'.join(map(str, path)): module.context_kv(used)
      for path, module in nnx.iter_modules(self)
      if isinstance(module, CrossAttention)
    }

  def __call__(
    self,
    sample: Float[Array, 'B F h w C_in'],
    timestep: Float[ArrayLike, ''] | Float[Array, ' B'],
    kv: ContextKV,
    added_time_ids: Real[Array, 'B ids'],
    spatial_condition: Float[Array, '#B #F h w C0'] | None = None,
    masks: Sequence[Float[Array, '#B _']] | None = None,
    adapter_scales: Sequence[float] | Float[Array, ' adapters'] = (1.0, 1.0),
    remat: str = 'none',
  ) -> tuple[Float[Array, 'B F h w C_out'], Float[Array, 'B F _ _ C_mid']]:
    """Evaluates the network once.

    Args:
      sample: 4 noisy channels (scaled), 4 of the reference latents. Height and width
        are multiples of 2**(levels-1).
      timestep: 0.25 ln sigma.
      kv: from `context_kv`; of per-frame entries, the frames of this window.
      added_time_ids: fps, two motion ids.
      spatial_condition: from the pose guider, for all frames or each; added after the
        first convolution.
      masks: `[B,tokens]` per level (`face_mask.mask_pyramid`): weight of the adapters
        in the spatial blocks.
      adapter_scales: weight of audio and emotion everywhere; 0 leaves an adapter out.
      remat: what the backward pass computes again instead of keeping it; see `REMAT`.

    Returns:
      The prediction, and the output of the middle block `[B,F,h/8,w/8,C_mid]`.
    """
    # 1. Embed noise level and ids, and choose what the backward pass keeps.
    temb = self._embed_time(timestep, added_time_ids, len(sample))
    kv = _scale_adapters(kv, adapter_scales)
    run = REMAT[remat](_apply)

    def inputs(name: str, level: int) -> Inputs:
      mask = None if masks is None else masks[level]
      return Inputs(temb, strip_prefix(name, kv), mask, run)

    x = self.conv_in(sample)
    if spatial_condition is not None:
      x += spatial_condition.astype(x.dtype)

    # 2. Down, keeping every tensor for the skip connections.
    skips = [x]
    for level, down_block in enumerate(self.down_blocks):
      skips += down_block(skips[-1], inputs(f'down_blocks.{level}', level))

    # 3. Middle.
    middle = self.mid_block(skips[-1], inputs('mid_block', self.config.levels - 1))

    # 4. Up, using the skip connections from the last to the first.
    x = middle
    for i, up_block in enumerate(self.up_blocks):
      used = [skips.pop() for _ in up_block.resnets]
      x = up_block(x, used, inputs(f'up_blocks.{i}', self.config.levels - 1 - i))

    # 5. The output, with per-frame statistics.
    x = nnx.silu(self.conv_norm_out(x.reshape(-1, *x.shape[2:]))).reshape(x.shape)
    return self.conv_out(x).astype(sample.dtype), middle

  def _embed_time(
    self, timestep: ArrayLike, added_time_ids: Array, rows: int
  ) -> Float[Array, '{rows} temb_channels']:
    """Adds the embeddings of noise level and added ids."""
    config = self.config
    timestep = jnp.broadcast_to(timestep, rows)
    time = self.time_embedding(sinusoid(timestep, config.block_out_channels[0]))
    ids = sinusoid(added_time_ids, config.addition_time_embed_dim)
    return time + self.add_embedding(ids.reshape(rows, -1))


def _apply(block: Callable[..., Array], *args: Any) -> Array:
  return block(*args)


def _scale_adapters(
  kv: ContextKV, scales: Sequence[float] | Float[Array, ' adapters']
) -> ContextKV:
  """Scales the values of each adapter, and so its contribution; scale 0 removes it."""

  def scaled(context: KeyValue | None, scale: float | Array) -> KeyValue | None:
    if context is None:
      return None
    if isinstance(scale, (int, float)) and scale == 0:
      return None
    value = context.value * jnp.asarray(scale, context.value.dtype)
    return KeyValue(context.key, value)

  return {
    name: (image, *map(scaled, adapters, scales))
    for name, (image, *adapters) in kv.items()
  }


def init_adapters_from_image(params: Mapping[str, Any]) -> dict[str, Any]:
  """Starts every adapter as a copy of its layer's image projections.

  Args:
    params: by dotted name, with or without a prefix such as `unet.`; includes the
      adapters (`to_k_ip`, `to_v_ip`).

  Returns:
    The same names; adapters are fresh copies, so that the dict can be donated.
  """
  initial = {}
  for name, value in params.items():
    source = re.sub(r'processor\.to_([kv])_ip\.\d+', r'to_\1', name)
    initial[name] = value if source == name else jnp.copy(params[source])
  return initial


def zero_residuals(params: Params) -> Params:
  """Sets the last layer of every residual branch, and the output, to zero.

  This is usual for a diffusion model that learns from scratch.
  """
  last_layer = re.compile(r'(conv2|proj_out|conv_out)\.kernel$')
  return {
    name: jnp.zeros_like(value) if last_layer.search(name) else value
    for name, value in params.items()
  }

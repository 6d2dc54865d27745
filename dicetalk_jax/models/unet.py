"""The denoiser: SVD's spatio-temporal UNet with decoupled audio and emotion adapters
(paper section 3.4).

Published as `UNetSpatioTemporalConditionModel` plus adapters. Without adapters it is
stock SVD; with one, Sonic.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp

from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.attention import CrossAttention, KeyValue
from dicetalk_jax.models.layers import GroupNorm, sinusoid
from dicetalk_jax.models.parameters import ModelConfig, Params, strip_prefix
from dicetalk_jax.models.resnet import Conv3x3, SpatioTemporalResBlock
from dicetalk_jax.models.transformer import EmbeddingMLP, SpatioTemporalTransformer
from dicetalk_jax.models.unet_blocks import DownBlock, Inputs, MidBlock, UpBlock

# Stage type -> whether it has transformers, and the epsilon of its resnets' norms.
STAGES = {
  'CrossAttnDownBlockSpatioTemporal': (True, 1e-6),
  'DownBlockSpatioTemporal': (False, 1e-5),
  'CrossAttnUpBlockSpatioTemporal': (True, 1e-6),
  'UpBlockSpatioTemporal': (False, 1e-6),
}
MID_EPSILON = 1e-5

# What the backward pass computes again: nothing; all of each resnet and transformer;
# all of them but products with weights, which take the most time and much of the
# memory.
REMAT = {
  'none': lambda f: f,
  'block': jax.checkpoint,
  'dots': functools.partial(
    jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  ),
}

ContextKV = Mapping[str, tuple[KeyValue | None, ...]]


@dataclasses.dataclass(frozen=True)
class UNetConfig(ModelConfig):
  """Reads the published `config.json`; tuples have one entry per level, an int
  stands for all levels.
  """

  in_channels: int = 8
  out_channels: int = 4
  down_block_types: tuple[str, ...] = ('CrossAttnDownBlockSpatioTemporal',) * 3 + (
    'DownBlockSpatioTemporal',
  )
  up_block_types: tuple[str, ...] = ('UpBlockSpatioTemporal',) + (
    'CrossAttnUpBlockSpatioTemporal',
  ) * 3
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

  def __post_init__(self):
    for field in ('down_block_types', 'up_block_types'):
      kinds = getattr(self, field)
      if unknown := [kind for kind in kinds if kind not in STAGES]:
        raise ConfigError(
          f'{field} of the UNet has {unknown[0]!r}, which is unknown; choose from '
          f'{", ".join(STAGES)}'
        )
      if len(kinds) != self.levels:
        raise ConfigError(
          f'{field} of the UNet has {len(kinds)} entries, but block_out_channels has '
          f'{self.levels}'
        )
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
    for level, width in enumerate(self.block_out_channels):
      heads = self.at(level, 'num_attention_heads')
      attends = any(
        STAGES[kind][0]
        for kind in (self.down_block_types[level], self.up_block_types[-1 - level])
      )
      if (
        width % self.norm_num_groups
        or (attends or level == self.levels - 1)
        and (heads < 1 or width % heads)
      ):
        raise ConfigError(
          f'block_out_channels={self.block_out_channels} of the UNet must be multiples '
          f'of norm_num_groups={self.norm_num_groups} and, where there is attention, '
          f'of num_attention_heads={self.num_attention_heads}'
        )

  @property
  def levels(self) -> int:
    return len(self.block_out_channels)

  def at(self, level: int, field: str) -> int:
    """The value of a per-level field."""
    value = getattr(self, field)
    return value[level] if isinstance(value, tuple) else value


class UNet(nnx.Module):
  """Down, middle and up stages with skip connections, after SVD; raw network output."""

  def __init__(self, config: UNetConfig, *, dtype=None, rngs):
    c, widths = config, config.block_out_channels
    temb = 4 * widths[0]
    make = functools.partial(dict, dtype=dtype, rngs=rngs)

    def blocks(level: int, attention: bool, epsilon: float) -> dict:
      """The two block factories of a stage."""
      transformer = functools.partial(
        SpatioTemporalTransformer,
        **make(
          heads=c.at(level, 'num_attention_heads'),
          context_dim=c.at(level, 'cross_attention_dim'),
          layers=c.at(level, 'transformer_layers_per_block'),
          adapters=c.adapters,
          groups=c.norm_num_groups,
        ),
      )
      return dict(
        resnet=functools.partial(
          SpatioTemporalResBlock,
          **make(groups=c.norm_num_groups, epsilon=epsilon, temb_channels=temb),
        ),
        transformer=transformer if attention else None,
      )

    self.config = config
    self.conv_in = Conv3x3(c.in_channels, widths[0], **make())
    self.time_embedding = EmbeddingMLP(widths[0], temb, temb, **make())
    self.add_embedding = EmbeddingMLP(
      c.projection_class_embeddings_input_dim, temb, temb, **make()
    )

    # Construction walks the same path as the forward pass: `width` is that of x,
    # `skips` the stack of skip tensors.
    width, skips = widths[0], [widths[0]]
    self.down_blocks = nnx.List([])
    for level, (kind, cout) in enumerate(zip(c.down_block_types, widths, strict=True)):
      layers, last = c.at(level, 'layers_per_block'), level == c.levels - 1
      self.down_blocks.append(
        DownBlock(
          width,
          cout,
          layers=layers,
          downsample=not last,
          **blocks(level, *STAGES[kind]),
          **make(),
        )
      )
      width = cout
      skips += [cout] * (layers + (not last))

    self.mid_block = MidBlock(width, **blocks(-1, True, MID_EPSILON))

    self.up_blocks = nnx.List([])
    for level, kind in zip(reversed(range(c.levels)), c.up_block_types, strict=True):
      used = [skips.pop() for _ in range(c.at(level, 'layers_per_block') + 1)]
      self.up_blocks.append(
        UpBlock(
          width,
          widths[level],
          used,
          upsample=level > 0,
          **blocks(level, *STAGES[kind]),
          **make(),
        )
      )
      width = widths[level]

    self.conv_norm_out = GroupNorm(width, c.norm_num_groups, epsilon=1e-5, **make())
    self.conv_out = Conv3x3(width, c.out_channels, **make())

  def context_kv(
    self,
    image: jax.Array,
    audio: jax.Array | None = None,
    emotion: jax.Array | None = None,
  ) -> dict[str, tuple[KeyValue | None, ...]]:
    """Keys and values of all cross-attentions: once per clip, not per step or window.

    Args:
      image: `[B,F',1,D]`, the CLIP token; zeros for the unconditional row.
      audio: `[B,F',T,D]` tokens of adapter 0, or None to leave it out.
      emotion: `[B,F',T,D]` tokens of adapter 1, or None.

    Returns:
      Name of each attn2 -> (k, v) per context, each `[B,F',T,C]`; None where a context
      is None. F' is the number of frames, or 1 for what all frames share, for each
      context by itself.

    Raises:
      ValueError: tokens are given for an adapter that the model does not have.
    """
    contexts, surplus = (
      (image, audio, emotion)[: 1 + self.config.adapters],
      (audio, emotion)[self.config.adapters :],
    )
    if any(tokens is not None for tokens in surplus):
      raise ValueError(
        f'the UNet has {self.config.adapters} adapters, but tokens for more were given'
      )
    return {
      '.'.join(map(str, path)): module.context_kv(contexts)
      for path, module in nnx.iter_modules(self)
      if isinstance(module, CrossAttention)
    }

  def __call__(
    self,
    sample: jax.Array,
    timestep: jax.Array,
    kv: ContextKV,
    added_time_ids: jax.Array,
    spatial_condition: jax.Array | None = None,
    masks: Sequence[jax.Array] | None = None,
    adapter_scales: Sequence[float] = (1.0, 1.0),
    remat: str = 'none',
  ) -> tuple[jax.Array, jax.Array]:
    """One evaluation of the network (the raw output; preconditioning is
    `diffusion.edm`).

    Args:
      sample: `[B,F,h,w,8]`: 4 noisy channels (scaled), 4 of the reference latents.
        Height and width are multiples of 2**(levels-1).
      timestep: `[]` or `[B]`, 0.25 ln sigma.
      kv: from `context_kv`; of per-frame entries, the frames of this window.
      added_time_ids: `[B,3]`: fps, two motion ids.
      spatial_condition: `[B,1 or F,h,w,C0]` from the pose guider, added after the first
        convolution.
      masks: per level `[B,tokens]` (`face_mask.mask_pyramid`): weight of the adapters
        in the spatial blocks.
      adapter_scales: weight of audio and emotion everywhere; 0 leaves an adapter out.
      remat: what the backward pass computes again instead of keeping it; see `REMAT`.

    Returns:
      The prediction `[B,F,h,w,4]`, and the output of the middle block
      `[B,F,h/8,w/8,C_mid]`.
    """
    temb = self._embed_time(timestep, added_time_ids, len(sample))
    kv = _scaled(kv, adapter_scales)
    run = REMAT[remat](_apply)

    def inputs(name: str, level: int) -> Inputs:
      return Inputs(
        temb, strip_prefix(name, kv), None if masks is None else masks[level], run
      )

    x = self.conv_in(sample)
    if spatial_condition is not None:
      x += spatial_condition.astype(x.dtype)
    skips = [x]
    for level, block in enumerate(self.down_blocks):
      skips += block(skips[-1], inputs(f'down_blocks.{level}', level))

    mid = x = self.mid_block(skips[-1], inputs('mid_block', -1))

    for i, block in enumerate(self.up_blocks):
      used = [skips.pop() for _ in block.resnets]
      x = block(x, used, inputs(f'up_blocks.{i}', self.config.levels - 1 - i))

    x = nnx.silu(self.conv_norm_out(x.reshape(-1, *x.shape[2:]))).reshape(x.shape)
    return self.conv_out(x).astype(sample.dtype), mid

  def _embed_time(
    self, timestep: jax.Array, added_time_ids: jax.Array, rows: int
  ) -> jax.Array:
    """The sum of the embeddings of noise level and added ids, `[rows,4*C0]`."""
    config = self.config
    time = self.time_embedding(
      sinusoid(jnp.broadcast_to(timestep, rows), config.block_out_channels[0])
    )
    ids = sinusoid(added_time_ids, config.addition_time_embed_dim)
    return time + self.add_embedding(ids.reshape(rows, -1))


def _apply(block: nnx.Module, *args) -> jax.Array:
  return block(*args)


def _scaled(kv: ContextKV, scales: Sequence[float]) -> ContextKV:
  """Scales the values of each adapter, which scales its contribution; scale 0
  removes it.
  """

  def scaled(pair, scale):
    if pair is None or (isinstance(scale, (int, float)) and scale == 0):
      return None
    return (pair[0], pair[1] * jnp.asarray(scale, pair[1].dtype))

  return {
    name: (image, *map(scaled, pairs, scales)) for name, (image, *pairs) in kv.items()
  }


def init_adapters_from_image(params: Params) -> Params:
  """Starts every adapter as a copy of its layer's image projections, as before training
  (`to_k_ip`, `to_v_ip`).

  Args:
    params: by dotted name, with or without a prefix such as `unet.`; holds the adapters
      already.

  Returns:
    The same names; adapters are fresh copies, so that the dict can be donated.
  """

  def source(name):
    return re.sub(r'processor\.to_([kv])_ip\.\d+', r'to_\1', name)

  return {
    name: value if source(name) == name else jnp.copy(params[source(name)])
    for name, value in params.items()
  }


def zero_residuals(params: Params) -> Params:
  """Begins every residual branch, and the output, at zero, as is usual where a
  diffusion model learns from nothing.
  """
  last = re.compile(r'(conv2|proj_out|conv_out)\.kernel$')
  return {
    name: jnp.zeros_like(value) if last.search(name) else value
    for name, value in params.items()
  }

"""Disentangled emotion embedder: facial expressions and speech to a Gaussian emotion
prior (paper section 3.1).
"""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp

from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.crop_encoder import CropEncoder
from dicetalk_jax.models.layers import LayerNorm
from dicetalk_jax.models.parameters import ModelConfig

CHOICES = {
  'whisper_layers': ('weighted', 'last'),
  'pack': ('concat', 'mean'),
  'pool': ('linear', 'mlp_mish'),
  'modalities': ('both', 'video', 'audio'),
  'expr_norm': ('none', 'zscore'),
  'visual': ('expression', 'crops'),
}


@dataclasses.dataclass(frozen=True)
class EmbedderConfig(ModelConfig):
  """Sizes and switches of the embedder (8.1 M parameters by default, 9.1 M with crops;
  no weights are published).

  Attributes:
    visual: what the face does: 'expression' coefficients of a 3DMM fit, as in the
      paper, or 'crops' of the pictures, read by a small encoder that is trained along.
    expr_dim: expression coefficients per video frame.
    crop_size: side of a crop in pixels.
    crop_channels: of the encoder's convolutions, each of which halves the side; the
      last are a frame's features.
    whisper_dim, whisper_states: width and number of the frozen Whisper states.
    whisper_layers: 'weighted' learns a mix of the states, 'last' takes the last one.
    pack: how the two Whisper positions of a video frame become one vector: 'concat' or
      'mean'.
    width: d_s, of all tokens and of the prior.
    lambda_ca: weight of the attention from speech to expressions (paper equation 3).
    lambda_learnable: makes that weight a parameter of each layer.
    pool: frame weights by one linear map (paper equation 4), or by 'mlp_mish' as in
      StyleTalk.
    var_eps: added to the variance under the root when sampling: the root's slope is
      infinite at 0.
    max_len: frames of the longest clip in training and embedding; the module itself
      takes any number.
    missing_token: a learned vector instead of zeros where a modality is missing.
    modalities: 'video' or 'audio' makes an embedder that never sees the other one
      (paper table 5).
    expr_norm: 'zscore' standardises expressions by `expr_mean` and `expr_std`,
      statistics of the training set.
  """

  visual: str = 'expression'
  expr_dim: int = 64
  crop_size: int = 64
  crop_channels: tuple[int, ...] = (32, 64, 128, 256, 256)
  whisper_dim: int = 384
  whisper_states: int = 5
  whisper_layers: str = 'weighted'
  pack: str = 'concat'
  width: int = 256
  heads: int = 8
  mlp_dim: int = 1024
  visual_layers: int = 3
  audio_layers: int = 3
  fusion_layers: int = 3
  dropout: float = 0.1
  lambda_ca: float = 1.0
  lambda_learnable: bool = False
  pool: str = 'linear'
  var_eps: float = 1e-6
  max_len: int = 256
  missing_token: bool = False
  modalities: str = 'both'
  expr_norm: str = 'none'

  def __post_init__(self):
    for name, choices in CHOICES.items():
      if getattr(self, name) not in choices:
        raise ConfigError(
          f'{name}={getattr(self, name)!r} is unknown; choose one of '
          f'{", ".join(choices)}'
        )
    if (
      self.heads < 1 or self.width % self.heads or self.width % 2
    ):  # the sinusoids come in pairs
      raise ConfigError(
        f'width={self.width} of the embedder must be even and a multiple of '
        f'heads={self.heads}'
      )
    least = 2 ** len(self.crop_channels)
    if least == 1 or self.crop_size <= 0 or self.crop_size % least:
      raise ConfigError(
        f'crop_size={self.crop_size} does not suit crop_channels={self.crop_channels}: '
        'each of one or more convolutions halves it; choose a multiple of '
        f'{max(2, least)}'
      )

  @property
  def visual_shape(self) -> tuple[int, ...]:
    """Of the visual input of one frame: `(expr_dim,)`, or uint8
    `(crop_size,crop_size,3)`.
    """
    return (
      (self.expr_dim,)
      if self.visual == 'expression'
      else (self.crop_size, self.crop_size, 3)
    )


def positions(length: int, width: int) -> jax.Array:
  """Fixed sinusoids, sine and cosine interleaved, base 10000: float32
  `[length,width]`.
  """
  frequency = jnp.exp(
    -math.log(10000) * jnp.arange(0, width, 2, dtype=jnp.float32) / width
  )
  angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
  return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(length, width)


class Attention(nnx.Module):
  """Multi-head attention with a key mask."""

  def __init__(self, width: int, heads: int, *, dtype=None, rngs):
    linear = functools.partial(
      nnx.Linear,
      width,
      width,
      kernel_init=nnx.initializers.xavier_uniform(),
      dtype=dtype,
      rngs=rngs,
    )
    self.q_proj = linear()
    self.k_proj = linear()
    self.v_proj = linear()
    self.out_proj = linear()
    self.heads = heads

  def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array) -> jax.Array:
    """x `[B,N,C]` attends to context `[B,M,C]` where mask `[B,M]` is True; a row
    without any True stays finite.
    """

    def split(y):
      return y.reshape(*y.shape[:2], self.heads, -1)

    y = jax.nn.dot_product_attention(
      split(self.q_proj(x)),
      split(self.k_proj(context)),
      split(self.v_proj(context)),
      mask=mask[:, None, None],
    )
    return self.out_proj(y.reshape(x.shape))


class Layer(nnx.Module):
  """Post-norm transformer layer: self-attention, then where `cross` attention to a
  second stream, then an MLP.

  As the last operation is a norm, frame vectors have squared norm `width` up to the
  norm's affine map.
  """

  def __init__(self, config: EmbedderConfig, *, cross: bool = False, dtype=None, rngs):
    width, make = config.width, dict(dtype=dtype, rngs=rngs)
    linear = functools.partial(
      nnx.Linear, kernel_init=nnx.initializers.xavier_uniform(), **make
    )
    self.self_attn = Attention(width, config.heads, **make)
    self.self_norm = LayerNorm(width, **make)
    self.cross_attn = Attention(width, config.heads, **make) if cross else None
    self.cross_norm = LayerNorm(width, **make) if cross else None
    learnable = cross and config.lambda_learnable
    self.cross_weight = (
      nnx.Param(jnp.full((), config.lambda_ca)) if learnable else config.lambda_ca
    )
    self.linear1 = linear(width, config.mlp_dim)
    self.linear2 = linear(config.mlp_dim, width)
    self.mlp_norm = LayerNorm(width, **make)
    self.dropout = nnx.Dropout(config.dropout)

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    context: jax.Array | None = None,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """x `[B,N,C]`, mask `[B,N]` of both streams, context `[B,N,C]`; returns
    `[B,N,C]`.
    """
    keys = iter([None] * 4 if key is None else jax.random.split(key, 4))

    def drop(y):
      key = next(keys)
      return self.dropout(y, deterministic=key is None, rngs=key)

    x = self.self_norm(x + drop(self.self_attn(x, x, mask)))
    if self.cross_attn is not None:
      weight = jnp.asarray(self.cross_weight, x.dtype)
      x = self.cross_norm(x + weight * drop(self.cross_attn(x, context, mask)))
    hidden = drop(nnx.relu(self.linear1(x)))
    return self.mlp_norm(x + drop(self.linear2(hidden)))


class Branch(nnx.Module):
  """One modality: frame features to a sequence of tokens."""

  def __init__(
    self, features: int, layers: int, config: EmbedderConfig, *, dtype=None, rngs
  ):
    self.linear_in = nnx.Linear(features, config.width, dtype=dtype, rngs=rngs)
    self.layers = nnx.List(
      [Layer(config, dtype=dtype, rngs=rngs) for _ in range(layers)]
    )
    self.missing = nnx.Param(jnp.zeros(features)) if config.missing_token else None

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    present: jax.Array,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """x `[B,N,features]`, mask `[B,N]`, present `[B]`; returns `[B,N,width]`."""
    # A missing modality is zero before the projection and the sinusoid, so that its
    # tokens still differ in time. Were the tokens themselves zero, the variance of a
    # prior from video alone would be zero.
    nothing = 0 if self.missing is None else self.missing[...]
    x = jnp.where(present[:, None, None], x, nothing)
    x = self.linear_in(jnp.where(mask[..., None], x, 0))
    x += positions(*x.shape[1:]).astype(x.dtype)
    for i, layer in enumerate(self.layers):
      x = layer(x, mask, key=_fold(key, i))
    return x


class Embedder(nnx.Module):
  """Expressions and speech of a clip to its emotion prior N(mu, var) (paper
  equations 2 to 6).
  """

  def __init__(self, config: EmbedderConfig, *, dtype=None, rngs):
    make = dict(dtype=dtype, rngs=rngs)
    packed = config.whisper_dim * (2 if config.pack == 'concat' else 1)
    self.config = config
    zscore = config.expr_norm == 'zscore'
    self.expr_mean = nnx.Param(jnp.zeros(config.expr_dim)) if zscore else None
    self.expr_std = nnx.Param(jnp.ones(config.expr_dim)) if zscore else None
    self.state_weights = (
      nnx.Param(jnp.zeros(config.whisper_states))
      if config.whisper_layers == 'weighted'
      else None
    )
    crops = config.visual == 'crops'
    self.crop_encoder = CropEncoder(config.crop_channels, **make) if crops else None
    self.visual = Branch(
      config.crop_channels[-1] if crops else config.expr_dim,
      config.visual_layers,
      config,
      **make,
    )
    self.audio = Branch(packed, config.audio_layers, config, **make)
    self.fusion = nnx.List(
      [Layer(config, cross=True, **make) for _ in range(config.fusion_layers)]
    )
    # The weights of frames are float32 throughout, on devices that round the operands
    # of products too.
    linear = functools.partial(nnx.Linear, config.width, precision='highest', rngs=rngs)
    self.pool_hidden = linear(config.width) if config.pool == 'mlp_mish' else None
    self.pool = linear(1, use_bias=False)

  def __call__(
    self,
    seen: jax.Array,
    whisper: jax.Array,
    frame_mask: jax.Array,
    has_video: jax.Array,
    has_audio: jax.Array,
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Embeds clips.

    Args:
      seen: `[B,N,*visual_shape]`, expression coefficients or face crops at 25 frames
        per second.
      whisper: `[B,2N,states,whisper_dim]`, frozen Whisper states, two positions per
        frame.
      frame_mask: bool `[B,N]`, True for real frames. What stands in other frames never
        matters.
      has_video, has_audio: bool `[B]`, False where a modality is missing or was
        dropped.
      key: turns dropout on.

    Returns:
      mu and var, float32 `[B,width]`; zeros for clips without a real frame.
    """
    video_key, audio_key, *fusion_keys = (
      _fold(key, i) for i in range(2 + len(self.fusion))
    )
    if self.expr_mean is not None:
      seen = (seen - self.expr_mean[...]) / self.expr_std[...]
    if self.crop_encoder is not None:
      seen = self.crop_encoder(seen)
    if self.config.modalities != 'both':
      has_video, has_audio = (
        jnp.logical_and(has, self.config.modalities == name)
        for has, name in ((has_video, 'video'), (has_audio, 'audio'))
      )
    visual = self.visual(seen, frame_mask, has_video, video_key)
    x = self.audio(self._packed(whisper), frame_mask, has_audio, audio_key)
    for layer, layer_key in zip(self.fusion, fusion_keys):
      x = layer(x, frame_mask, visual, layer_key)
    return self._aggregate(x.astype(jnp.float32), frame_mask)

  def _packed(self, whisper: jax.Array) -> jax.Array:
    """`[B,2N,states,D]` to one vector per video frame."""
    if self.state_weights is None:
      x = whisper[:, :, -1]
    else:
      x = jnp.einsum('bnsd,s->bnd', whisper, jax.nn.softmax(self.state_weights[...]))
    pairs = x.reshape(x.shape[0], -1, 2, x.shape[-1])
    return (
      pairs.mean(axis=2)
      if self.config.pack == 'mean'
      else pairs.reshape(*pairs.shape[:2], -1)
    )

  def _aggregate(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted mean and variance over frames (paper equations 4 and 5)."""
    hidden = x if self.pool_hidden is None else jax.nn.mish(self.pool_hidden(x))
    # Finite instead of minus infinity: a clip without frames gets zeros and no NaN, in
    # the gradient too.
    mask = mask[..., None]
    weight = jax.nn.softmax(jnp.where(mask, self.pool(hidden), -1e30), axis=1) * mask
    mu = (weight * x).sum(1)
    var = (weight * jnp.square(x - mu[:, None])).sum(1)
    return mu, var

  def sample(self, mu: jax.Array, var: jax.Array, key: jax.Array) -> jax.Array:
    """Draws s from the prior (paper equation 6); shapes and type of `mu` and `var`."""
    return mu + jnp.sqrt(var + self.config.var_eps) * jax.random.normal(
      key, mu.shape, mu.dtype
    )


def _fold(key: jax.Array | None, i: int) -> jax.Array | None:
  return None if key is None else jax.random.fold_in(key, i)

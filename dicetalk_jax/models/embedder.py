"""Disentangled emotion embedder (paper section 3.1).

It maps facial expressions and speech to a Gaussian emotion prior.
"""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key, Real

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
  """Sizes and switches of the embedder.

  It has 8.1 M parameters by default, 9.1 M with crops; no weights are published.

  Attributes:
    visual: the visual input: 'expression' coefficients of a 3DMM fit, as in the paper,
      or face 'crops', read by a small encoder that is trained along.
    expr_dim: expression coefficients per video frame.
    crop_size: side of a crop in pixels.
    crop_channels: of the encoder's convolutions, each of which halves the side; the
      last ones are a frame's features.
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
      takes clips of any length.
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

  def __post_init__(self) -> None:
    for name, choices in CHOICES.items():
      value = getattr(self, name)
      if value not in choices:
        raise ConfigError(
          f'{name}={value!r} is unknown; choose one of {", ".join(choices)}'
        )
    # The sinusoids come in pairs, so an odd width is refused.
    if self.heads < 1 or self.width % self.heads or self.width % 2:
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
    """Shape of a frame's visual input: `(expr_dim,)`, or that of its uint8 crop."""
    if self.visual == 'expression':
      return (self.expr_dim,)
    return (self.crop_size, self.crop_size, 3)


def positions(length: int, width: int) -> Float[Array, '{length} {width}']:
  """Fixed sinusoids, sine and cosine interleaved, base 10000, float32."""
  frequency = jnp.exp(
    -math.log(10000) * jnp.arange(0, width, 2, dtype=jnp.float32) / width
  )
  angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
  return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(length, width)


class Attention(nnx.Module):
  """Multi-head attention with a key mask."""

  def __init__(
    self, width: int, heads: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
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

  def __call__(
    self,
    x: Float[Array, 'B N C'],
    context: Float[Array, 'B M C'],
    mask: Bool[Array, 'B M'],
  ) -> Float[Array, 'B N C']:
    """Attends to the context where the mask is True.

    A row without any True stays finite.
    """

    def split_heads(y: Array) -> Array:
      return y.reshape(*y.shape[:2], self.heads, -1)

    q = split_heads(self.q_proj(x))
    k = split_heads(self.k_proj(context))
    v = split_heads(self.v_proj(context))
    y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None])
    return self.out_proj(y.reshape(x.shape))


class Layer(nnx.Module):
  """Post-norm transformer layer: self-attention, cross-attention if `cross`, an MLP.

  As the last operation is a norm, frame vectors have squared norm `width` up to the
  norm's affine map.
  """

  def __init__(
    self,
    config: EmbedderConfig,
    *,
    cross: bool = False,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    width = config.width
    attention = functools.partial(
      Attention, width, config.heads, dtype=dtype, rngs=rngs
    )
    norm = functools.partial(LayerNorm, width, dtype=dtype, rngs=rngs)
    xavier = nnx.initializers.xavier_uniform()
    self.self_attn = attention()
    self.self_norm = norm()
    self.cross_attn = attention() if cross else None
    self.cross_norm = norm() if cross else None
    self.cross_weight: float | nnx.Param[Array]
    if cross and config.lambda_learnable:
      self.cross_weight = nnx.Param(jnp.full((), config.lambda_ca))
    else:
      self.cross_weight = config.lambda_ca
    self.linear1 = nnx.Linear(
      width, config.mlp_dim, kernel_init=xavier, dtype=dtype, rngs=rngs
    )
    self.linear2 = nnx.Linear(
      config.mlp_dim, width, kernel_init=xavier, dtype=dtype, rngs=rngs
    )
    self.mlp_norm = norm()
    self.dropout = nnx.Dropout(config.dropout)

  def __call__(
    self,
    x: Float[Array, 'B N C'],
    mask: Bool[Array, 'B N'],
    context: Float[Array, 'B N C'] | None = None,
    key: Key[Array, ''] | None = None,
  ) -> Float[Array, 'B N C']:
    """Computes the layer.

    Args:
      x: the stream of frames.
      mask: True for real frames, of both streams.
      context: the second stream, if the layer is a `cross` layer.
      key: turns dropout on.
    """
    keys = iter([None] * 4 if key is None else jax.random.split(key, 4))

    def drop(y: Array) -> Array:
      """Applies dropout with the next key, if there are keys."""
      drop_key = next(keys)
      return self.dropout(y, deterministic=drop_key is None, rngs=drop_key)

    x = self.self_norm(x + drop(self.self_attn(x, x, mask)))
    if self.cross_attn is not None:
      assert self.cross_norm is not None and context is not None
      weight = jnp.asarray(self.cross_weight, x.dtype)
      x = self.cross_norm(x + weight * drop(self.cross_attn(x, context, mask)))
    hidden = drop(nnx.relu(self.linear1(x)))
    out: Array = self.mlp_norm(x + drop(self.linear2(hidden)))
    return out


class Branch(nnx.Module):
  """One modality: frame features to a sequence of tokens."""

  def __init__(
    self,
    features: int,
    layers: int,
    config: EmbedderConfig,
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    self.linear_in = nnx.Linear(features, config.width, dtype=dtype, rngs=rngs)
    self.layers = nnx.List(
      [Layer(config, dtype=dtype, rngs=rngs) for _ in range(layers)]
    )
    self.missing = nnx.Param(jnp.zeros(features)) if config.missing_token else None

  def __call__(
    self,
    x: Float[Array, 'B N features'],
    mask: Bool[Array, 'B N'],
    present: Bool[Array, ' B'],
    key: Key[Array, ''] | None = None,
  ) -> Float[Array, 'B N width']:
    """Computes the tokens of clips.

    Args:
      x: frame features.
      mask: True for real frames.
      present: False where the modality is missing.
      key: turns dropout on.
    """
    # A missing modality is zero before the projection and the sinusoid, so that its
    # tokens still differ in time. Were the tokens themselves zero, the variance of a
    # prior from video alone would be zero.
    nothing = 0 if self.missing is None else self.missing[...]
    x = jnp.where(present[:, None, None], x, nothing)
    x = self.linear_in(jnp.where(mask[..., None], x, 0))
    _, frames, width = x.shape
    x += positions(frames, width).astype(x.dtype)
    for i, layer in enumerate(self.layers):
      x = layer(x, mask, key=_fold(key, i))
    return x


class Embedder(nnx.Module):
  """Expressions and speech of a clip to its emotion prior N(mu, var) (paper
  equations 2 to 6).
  """

  def __init__(
    self, config: EmbedderConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    self.config = config
    if config.expr_norm == 'none':
      self.expr_mean = None
      self.expr_std = None
    else:
      self.expr_mean = nnx.Param(jnp.zeros(config.expr_dim))
      self.expr_std = nnx.Param(jnp.ones(config.expr_dim))
    if config.whisper_layers == 'last':
      self.state_weights = None
    else:
      self.state_weights = nnx.Param(jnp.zeros(config.whisper_states))

    if config.visual == 'expression':
      visual_features = config.expr_dim
      self.crop_encoder = None
    else:
      visual_features = config.crop_channels[-1]
      self.crop_encoder = CropEncoder(config.crop_channels, dtype=dtype, rngs=rngs)
    audio_features = config.whisper_dim
    if config.pack == 'concat':
      audio_features *= 2
    self.visual = Branch(
      visual_features, config.visual_layers, config, dtype=dtype, rngs=rngs
    )
    self.audio = Branch(
      audio_features, config.audio_layers, config, dtype=dtype, rngs=rngs
    )
    self.fusion = nnx.List(
      [
        Layer(config, cross=True, dtype=dtype, rngs=rngs)
        for _ in range(config.fusion_layers)
      ]
    )

    # The weights of frames are float32 throughout, on devices that round the operands
    # of products too.
    linear = functools.partial(nnx.Linear, config.width, precision='highest', rngs=rngs)
    self.pool_hidden = linear(config.width) if config.pool == 'mlp_mish' else None
    self.pool = linear(1, use_bias=False)

  def __call__(
    self,
    seen: Real[Array, 'B N *visual_shape'],
    whisper: Float[Array, 'B 2*N states whisper_dim'],
    frame_mask: Bool[Array, 'B N'],
    has_video: Bool[Array, ' B'],
    has_audio: Bool[Array, ' B'],
    key: Key[Array, ''] | None = None,
  ) -> tuple[Float[Array, 'B width'], Float[Array, 'B width']]:
    """Embeds clips.

    Args:
      seen: expression coefficients or uint8 face crops at 25 frames per second; see
        `EmbedderConfig.visual_shape`.
      whisper: frozen Whisper states, two positions per frame.
      frame_mask: True for real frames. The content of other frames never matters.
      has_video, has_audio: False where a modality is missing or was dropped.
      key: turns dropout on.

    Returns:
      mu and var, float32; zeros for clips without a real frame.
    """
    keys = [_fold(key, i) for i in range(2 + len(self.fusion))]
    video_key, audio_key, *fusion_keys = keys

    # 1. Read the face.
    if self.expr_mean is not None and self.expr_std is not None:
      seen = (seen - self.expr_mean[...]) / self.expr_std[...]
    if self.crop_encoder is not None:
      seen = self.crop_encoder(seen)

    # 2. Hide the modality that this embedder never sees.
    if self.config.modalities != 'both':
      has_video = jnp.logical_and(has_video, self.config.modalities == 'video')
      has_audio = jnp.logical_and(has_audio, self.config.modalities == 'audio')

    # 3. Turn each modality into tokens.
    visual = self.visual(seen, frame_mask, has_video, video_key)
    packed = self._pack(whisper)
    x = self.audio(packed, frame_mask, has_audio, audio_key)

    # 4. Let speech attend to expressions, and summarise the frames.
    for layer, layer_key in zip(self.fusion, fusion_keys):
      x = layer(x, frame_mask, visual, layer_key)
    return self._aggregate(x.astype(jnp.float32), frame_mask)

  def _pack(
    self, whisper: Float[Array, 'B positions states D']
  ) -> Float[Array, 'B N features']:
    """Joins the states of each video frame to one vector."""
    if self.state_weights is None:
      x = whisper[:, :, -1]
    else:
      x = jnp.einsum('bnsd,s->bnd', whisper, jax.nn.softmax(self.state_weights[...]))
    clips, positions, width = x.shape
    pairs = x.reshape(clips, positions // 2, 2, width)
    if self.config.pack == 'mean':
      return pairs.mean(axis=2)
    return pairs.reshape(clips, positions // 2, 2 * width)

  def _aggregate(
    self, x: Float[Array, 'B N width'], mask: Bool[Array, 'B N']
  ) -> tuple[Float[Array, 'B width'], Float[Array, 'B width']]:
    """Weighted mean and variance over frames (paper equations 4 and 5)."""
    hidden = x if self.pool_hidden is None else jax.nn.mish(self.pool_hidden(x))
    mask = mask[..., None]
    # Finite instead of minus infinity: a clip without frames gets zeros instead of NaN,
    # in the gradient too.
    logits = jnp.where(mask, self.pool(hidden), -1e30)
    weight = jax.nn.softmax(logits, axis=1) * mask
    mu = (weight * x).sum(1)
    var = (weight * jnp.square(x - mu[:, None])).sum(1)
    return mu, var

  def sample(
    self,
    mu: Float[Array, '*shape'],
    var: Float[Array, '*shape'],
    key: Key[Array, ''],
  ) -> Float[Array, '*shape']:
    """Draws s from the prior (paper equation 6)."""
    deviation = jnp.sqrt(var + self.config.var_eps)
    return mu + deviation * jax.random.normal(key, mu.shape, mu.dtype)


def _fold(key: Array | None, i: int) -> Array | None:
  """The i-th key derived from `key`, if there is one."""
  return None if key is None else jax.random.fold_in(key, i)

"""Emotion bank, conditioning tokens and emotion classifier (paper section 3.2;
published file `emo_model.pth`).
"""

import dataclasses
import functools
from typing import NamedTuple

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from dicetalk_jax.errors import ConfigError
from dicetalk_jax.models.attention import attend
from dicetalk_jax.models.audio_projection import AudioProjection, AudioProjectionConfig
from dicetalk_jax.models.parameters import ModelConfig

CHOICES = {
  'mode': ('bank', 'direct', 'learnable'),
  'distance': ('l2', 'cosine'),
  'codebook_update': ('grad', 'ema'),
  'null_kv': ('released', 'zeros', 'bank'),
}
BANK_ONLY = {
  'distance': 'l2',
  'codebook_update': 'grad',
  'stop_fc_grad': False,
  'null_kv': 'released',
}


@dataclasses.dataclass(frozen=True)
class EmotionConfig(ModelConfig):
  """Sizes of the emotion model; the defaults are those of the published file.

  `mode` chooses between the paper's model and its ablations (table 4): 'bank' looks a
  prior up in a vector-quantised bank and attends to what it finds; 'learnable' attends
  to a free table, without look-up ("learnable CA"); 'direct' has no attention at all
  ("w/o emotion bank").

  Attributes:
    commitment: beta of paper equation 17.
    distance: between projected priors and codes; 'cosine' ignores lengths.
    codebook_update: 'grad', as released: the codes follow the gradient of the first
      term of equation 17; 'ema': they are moving averages of the projected priors, kept
      by the training task, and that term is left out.
    stop_fc_grad: the commitment term does not move the projection of priors (it shrinks
      them towards small codes).
    null_kv: what "no emotion" attends to: 'zeros', the tokens of a zero code; 'bank',
      the whole bank; 'released', zeros in training and the bank in sampling.
  """

  prior_dim: int = 256
  dim: int = 1024
  intermediate_dim: int = 1024
  tokens: int = 32
  codebook_size: int = 64
  num_heads: int = 8
  mode: str = 'bank'
  commitment: float = 0.25
  distance: str = 'l2'
  codebook_update: str = 'grad'
  stop_fc_grad: bool = False
  null_kv: str = 'released'
  classifier_in: int = 1280
  classifier_hidden: tuple[int, int] = (512, 256)
  num_classes: int = 22
  dropout: float = 0.1

  def __post_init__(self):
    for name, choices in CHOICES.items():
      if (value := getattr(self, name)) not in choices:
        raise ConfigError(
          f'{name}={value!r} of the emotion model is unknown; choose one of '
          f'{", ".join(choices)}'
        )
    for name, plain in BANK_ONLY.items():
      if self.mode != 'bank' and (value := getattr(self, name)) != plain:
        raise ConfigError(
          f"{name}={value!r} of the emotion model needs mode='bank', but "
          f'mode={self.mode!r} looks nothing up; leave it at {plain!r}'
        )
    if self.mode != 'direct' and (self.num_heads < 1 or self.dim % self.num_heads):
      raise ConfigError(
        f'dim={self.dim} of the emotion model must be a multiple of '
        f'num_heads={self.num_heads}'
      )


class VQ(NamedTuple):
  """What a look-up tells besides its result."""

  loss: jax.Array  # float32 scalar (paper equation 17, as a mean over elements)
  indices: (
    jax.Array
  )  # int32 [B], the code of each prior; empty in modes without look-up
  z: jax.Array  # float32 [B,D], the projected priors; likewise
  error: jax.Array  # float32 scalar, mean square of z minus its code


class Codebook(nnx.Module):
  """The emotion bank: `codebook_size` vectors, and the projection of priors to their
  space. Computes in float32.
  """

  def __init__(self, config: EmotionConfig, *, rngs):
    size = config.codebook_size

    def uniform(key, shape, dtype=jnp.float32):
      return jax.random.uniform(key, shape, dtype, -1 / size, 1 / size)

    self.fc = (
      nnx.Linear(config.prior_dim, config.dim, rngs=rngs)
      if config.mode == 'bank'
      else None
    )
    self.codebook = nnx.Embed(size, config.dim, embedding_init=uniform, rngs=rngs)
    self.config = config

  @property
  def codes(self) -> jax.Array:
    """The bank, `[K,D]`; nothing learns them by gradient if they are moving
    averages.
    """
    codes = self.codebook.embedding[...].astype(jnp.float32)
    return lax.stop_gradient(codes) if self.config.codebook_update == 'ema' else codes

  def __call__(self, prior: jax.Array) -> tuple[jax.Array, VQ]:
    """Replaces priors `[B,d_s]` by their nearest codes `[B,D]`, straight through for
    the gradient.

    The codes learn from the first term of the loss only; `fc` from the second, and from
    whatever uses the result.
    """
    z = self.fc(prior.astype(jnp.float32))
    fixed, config = lax.stop_gradient, self.config
    scale = _unit if config.distance == 'cosine' else lambda x: x
    # Differences rather than |z|^2 + |c|^2 - 2 z.c: exact on devices that round the
    # operands of products.
    distance = jnp.square(scale(z)[:, None] - scale(self.codes)).sum(-1)
    indices = jnp.argmin(distance, axis=-1).astype(jnp.int32)
    code = self.codes[indices]
    codebook = (
      0 if config.codebook_update == 'ema' else jnp.mean(jnp.square(code - fixed(z)))
    )
    commitment = jnp.mean(
      jnp.square(fixed(code) - (fixed(z) if config.stop_fc_grad else z))
    )
    return z + fixed(code - z), VQ(
      codebook + config.commitment * commitment, indices, fixed(z), fixed(commitment)
    )


def _unit(x: jax.Array) -> jax.Array:
  return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


class TokenAttention(nnx.Module):
  """Multi-head attention without output projection, residual or norm (published name
  `attention`).
  """

  def __init__(self, dim: int, heads: int, *, dtype=None, rngs):
    linear = functools.partial(nnx.Linear, dim, dim, dtype=dtype, rngs=rngs)
    self.fc_q = linear()
    self.fc_k = linear()
    self.fc_v = linear()
    self.heads = heads

  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    """x `[B,T,D]`, context `[B,S,D]`, or `[1,S,D]` where all rows share it; returns
    `[B,T,D]`.
    """

    # Rows that share keys become more queries to the same keys: nothing is copied.
    def split(y):
      return y.reshape(len(context), -1, self.heads, y.shape[-1] // self.heads)

    return attend(
      split(self.fc_q(x)), split(self.fc_k(context)), split(self.fc_v(context))
    ).reshape(x.shape)


class Classifier(nnx.Module):
  """Emotion classifier on features of the UNet's middle block (paper equation 16);
  not used when sampling.
  """

  def __init__(self, config: EmotionConfig, *, dtype=None, rngs):
    first, second = config.classifier_hidden
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    self.fc1 = linear(config.classifier_in, first)
    self.fc2 = linear(first, second)
    self.fc3 = linear(second, config.num_classes)
    self.dropout = nnx.Dropout(config.dropout)

  def __call__(self, features: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """features `[N,h,w,C]`; returns logits `[N,classes]`. `key` turns dropout on."""
    keys = (None, None) if key is None else jax.random.split(key)
    x = features.mean(axis=(1, 2), dtype=jnp.float32)
    for layer, drop_key in zip((self.fc1, self.fc2), keys):
      x = self.dropout(
        nnx.relu(layer(x)), deterministic=drop_key is None, rngs=drop_key
      )
    return self.fc3(x)


class EmotionModel(nnx.Module):
  """An emotion prior to the emotion tokens of a clip (published `emo_model`; paper
  equations 9 to 13).

  One prior serves a whole clip: compute its tokens once and share them between frames.
  """

  def __init__(self, config: EmotionConfig, *, dtype=None, rngs):
    # The published sizes of an audio projection with one position and one state.
    def projection(width):
      return AudioProjection(
        AudioProjectionConfig(
          seq_len=1,
          blocks=1,
          channels=width,
          intermediate_dim=config.intermediate_dim,
          output_dim=config.dim,
          context_tokens=config.tokens,
        ),
        dtype=dtype,
        rngs=rngs,
      )

    attends = config.mode != 'direct'
    self.config = config
    self.emo_linear = projection(config.prior_dim)
    self.kv_tokens_linear = projection(config.dim) if attends else None
    self.codebook = Codebook(config, rngs=rngs) if attends else None
    self.attention = (
      TokenAttention(config.dim, config.num_heads, dtype=dtype, rngs=rngs)
      if attends
      else None
    )
    self.classifier = Classifier(config, dtype=dtype, rngs=rngs)

  def __call__(
    self, prior: jax.Array, retrieval: bool, drop: jax.Array | None = None
  ) -> tuple[jax.Array, VQ]:
    """Tokens of a batch of priors.

    Args:
      prior: `[B,d_s]`, one sample or mean per clip.
      retrieval: attend to the tokens of the retrieved code (training), or to those of
        the whole bank (the released setting for sampling). Only mode 'bank' retrieves.
      drop: bool `[B]`: True where the condition is dropped. Prior and retrieved code
        then count as zero (but see `null_kv`); the loss is that of the prior
        nevertheless.

    Returns:
      Tokens `[B,tokens,dim]`, and the look-up: its loss is 0 without retrieval.
    """

    def keep(x):
      return x if drop is None else jnp.where(drop[:, None], 0, x)

    tokens = self.emo_linear(keep(prior)[:, None])[:, 0]
    code, vq = self._look_up(prior)
    if self.attention is None:
      return tokens, vq
    if retrieval and code is not None:
      context = self.kv_tokens_linear(keep(code)[:, None])[:, 0]
    else:
      context = self.kv_tokens_linear(self.codebook.codes[None]).reshape(
        1, -1, self.config.dim
      )
      vq = vq._replace(loss=jnp.zeros(()))
    out = self.attention(tokens, context)
    if drop is not None and retrieval and self.config.null_kv == 'bank':
      out = jnp.where(drop[:, None, None], self.null_tokens(), out)
    return out, vq

  def _look_up(self, prior: jax.Array) -> tuple[jax.Array | None, VQ]:
    if self.config.mode == 'bank':
      return self.codebook(prior)
    return None, VQ(
      jnp.zeros(()),
      jnp.zeros(0, jnp.int32),
      jnp.zeros((0, self.config.dim)),
      jnp.zeros(()),
    )

  def null_tokens(self, retrieval: bool = False) -> jax.Array:
    """The tokens of "no emotion", `[tokens,dim]`: a constant of the weights.

    Queries are those of a zero prior. By default they attend to the whole bank, as the
    released sampler has it; with `retrieval` to the zero code, which is what training
    puts in place of a dropped emotion. `null_kv` may ask for one of the two everywhere.
    """
    zeros = {'released': retrieval, 'zeros': True, 'bank': False}[self.config.null_kv]
    nothing = jnp.zeros((1, self.config.prior_dim))
    return self(nothing, zeros, drop=jnp.ones(1, bool))[0][0]

  def classify(self, features: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Emotion logits of feature maps.

    Args:
      features: `[N,h,w,classifier_in]`, output of the UNet's middle block, a row per
        frame.
      key: turns dropout on.

    Returns:
      `[N,num_classes]`.
    """
    return self.classifier(features, key)

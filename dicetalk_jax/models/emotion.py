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
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

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
# Settings that only mode 'bank' has, and their values in the other modes.
BANK_ONLY = {
  'distance': 'l2',
  'codebook_update': 'grad',
  'stop_fc_grad': False,
  'null_kv': 'released',
}


@dataclasses.dataclass(frozen=True)
class EmotionConfig(ModelConfig):
  """Sizes of the emotion model; the defaults are those of the published file.

  Attributes:
    mode: the paper's model, or one of its ablations (table 4). 'bank' looks a prior up
      in a vector-quantised bank and attends to the code it finds; 'learnable' attends
      to a free table, without look-up ("learnable CA"); 'direct' has no attention at
      all ("w/o emotion bank").
    commitment: beta of paper equation 17.
    distance: between projected priors and codes; 'cosine' ignores lengths.
    codebook_update: 'grad', as released: the codes follow the gradient of the first
      term of equation 17; 'ema': they are moving averages of the projected priors, kept
      by the training task, and that term is left out.
    stop_fc_grad: the commitment term does not move the projection of priors (it shrinks
      them towards small codes).
    null_kv: what "no emotion" attends to: 'zeros', the tokens of a zero code; 'bank',
      the whole bank; 'released', zeros in training, and in sampling what any prior
      would, see `EmotionModel.null_tokens`.
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

  def __post_init__(self) -> None:
    for name, choices in CHOICES.items():
      value = getattr(self, name)
      if value not in choices:
        raise ConfigError(
          f'{name}={value!r} of the emotion model is unknown; choose one of '
          f'{", ".join(choices)}'
        )
    for name, default in BANK_ONLY.items():
      value = getattr(self, name)
      if self.mode != 'bank' and value != default:
        raise ConfigError(
          f"{name}={value!r} of the emotion model needs mode='bank', but "
          f'mode={self.mode!r} looks nothing up; leave it at {default!r}'
        )
    if self.mode != 'direct' and (self.num_heads < 1 or self.dim % self.num_heads):
      raise ConfigError(
        f'dim={self.dim} of the emotion model must be a multiple of '
        f'num_heads={self.num_heads}'
      )


class VQ(NamedTuple):
  """The by-products of a look-up.

  Attributes:
    loss: paper equation 17, as a mean over elements; float32.
    indices: the code of each prior; empty in modes without look-up.
    z: the projected priors, float32; likewise.
    error: mean square of z minus its code, float32.
  """

  loss: Float[Array, '']
  indices: Int[Array, ' B']
  z: Float[Array, 'B D']
  error: Float[Array, '']


class Codebook(nnx.Module):
  """The emotion bank: `codebook_size` vectors, and the projection of priors to their
  space. Computes in float32.
  """

  def __init__(self, config: EmotionConfig, *, rngs: nnx.Rngs):
    limit = 1 / config.codebook_size
    uniform = functools.partial(jax.random.uniform, minval=-limit, maxval=limit)
    if config.mode != 'bank':
      self.fc = None
    else:
      self.fc = nnx.Linear(config.prior_dim, config.dim, rngs=rngs)
    self.codebook = nnx.Embed(
      config.codebook_size, config.dim, embedding_init=uniform, rngs=rngs
    )
    self.config = config

  @property
  def codes(self) -> Float[Array, 'K D']:
    """The bank; gradients do not reach codes that are moving averages."""
    codes = self.codebook.embedding[...].astype(jnp.float32)
    return lax.stop_gradient(codes) if self.config.codebook_update == 'ema' else codes

  def __call__(self, prior: Float[Array, 'B d_s']) -> tuple[Float[Array, 'B D'], VQ]:
    """Replaces priors by their nearest codes, straight through for the gradient.

    The codes learn from the first term of the loss only; with codebook_update='ema' not
    from any gradient. `fc` learns from whatever uses the result, and from the second
    term unless `stop_fc_grad` is set.
    """
    assert self.fc is not None, "only mode 'bank' looks priors up"
    config = self.config
    z = self.fc(prior.astype(jnp.float32))
    fixed_z = lax.stop_gradient(z)

    # 1. Find the nearest code. Differences rather than |z|^2 + |c|^2 - 2 z.c: exact on
    # devices that round the operands of products.
    if config.distance == 'cosine':
      difference = _unit(z)[:, None] - _unit(self.codes)
    else:
      difference = z[:, None] - self.codes
    distance = jnp.square(difference).sum(-1)
    indices = jnp.argmin(distance, axis=-1).astype(jnp.int32)
    code = self.codes[indices]
    fixed_code = lax.stop_gradient(code)

    # 2. Compute the loss: codes move to priors, and priors commit to codes.
    codebook_loss: Array | int = 0
    if config.codebook_update == 'grad':
      codebook_loss = jnp.mean(jnp.square(code - fixed_z))
    committed = fixed_z if config.stop_fc_grad else z
    commitment = jnp.mean(jnp.square(fixed_code - committed))

    # 3. Return the codes with the gradient of z.
    straight_through = z + lax.stop_gradient(code - z)
    vq = VQ(
      loss=codebook_loss + config.commitment * commitment,
      indices=indices,
      z=fixed_z,
      error=lax.stop_gradient(commitment),
    )
    return straight_through, vq


def _unit(x: Float[Array, '*rows D']) -> Float[Array, '*rows D']:
  """Scales vectors to length 1."""
  return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


class TokenAttention(nnx.Module):
  """Multi-head attention without output projection, residual or norm (published name
  `attention`).
  """

  def __init__(
    self, dim: int, heads: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    linear = functools.partial(nnx.Linear, dim, dim, dtype=dtype, rngs=rngs)
    self.fc_q = linear()
    self.fc_k = linear()
    self.fc_v = linear()
    self.heads = heads

  def __call__(
    self, x: Float[Array, 'B T D'], context: Float[Array, '#B S D']
  ) -> Float[Array, 'B T D']:
    """Attends from x to the context, which all rows may share."""

    # Rows that share keys become more queries to the same keys: nothing is copied.
    def split_heads(y: Array) -> Array:
      return y.reshape(len(context), -1, self.heads, y.shape[-1] // self.heads)

    q = split_heads(self.fc_q(x))
    k = split_heads(self.fc_k(context))
    v = split_heads(self.fc_v(context))
    return attend(q, k, v).reshape(x.shape)


class Classifier(nnx.Module):
  """Emotion classifier on features of the UNet's middle block (paper equation 16).

  It is not used when sampling.
  """

  def __init__(
    self, config: EmotionConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    first, second = config.classifier_hidden
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    self.fc1 = linear(config.classifier_in, first)
    self.fc2 = linear(first, second)
    self.fc3 = linear(second, config.num_classes)
    self.dropout = nnx.Dropout(config.dropout)

  def __call__(
    self, features: Float[Array, 'N h w C'], key: Key[Array, ''] | None = None
  ) -> Float[Array, 'N classes']:
    """Computes logits; `key` turns dropout on."""
    keys = (None, None) if key is None else jax.random.split(key)
    x = features.mean(axis=(1, 2), dtype=jnp.float32)
    for layer, drop_key in zip((self.fc1, self.fc2), keys):
      x = nnx.relu(layer(x))
      x = self.dropout(x, deterministic=drop_key is None, rngs=drop_key)
    return self.fc3(x)


class EmotionModel(nnx.Module):
  """An emotion prior to the emotion tokens of a clip (published `emo_model`; paper
  equations 9 to 13).

  One prior serves a whole clip: compute its tokens once and share them between frames.
  """

  def __init__(
    self, config: EmotionConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    def projection(width: int) -> AudioProjection:
      """An audio projection with one position and one state."""
      sizes = AudioProjectionConfig(
        seq_len=1,
        blocks=1,
        channels=width,
        intermediate_dim=config.intermediate_dim,
        output_dim=config.dim,
        context_tokens=config.tokens,
      )
      return AudioProjection(sizes, dtype=dtype, rngs=rngs)

    self.config = config
    self.emo_linear = projection(config.prior_dim)
    if config.mode == 'direct':
      self.kv_tokens_linear = None
      self.codebook = None
      self.attention = None
    else:
      self.kv_tokens_linear = projection(config.dim)
      self.codebook = Codebook(config, rngs=rngs)
      self.attention = TokenAttention(
        config.dim, config.num_heads, dtype=dtype, rngs=rngs
      )
    self.classifier = Classifier(config, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    prior: Float[Array, 'B d_s'],
    retrieval: bool,
    drop: Bool[Array, ' B'] | None = None,
  ) -> tuple[Float[Array, 'B tokens dim'], VQ]:
    """Computes the tokens of a batch of priors.

    Args:
      prior: one sample or mean per clip.
      retrieval: attend to the tokens of the retrieved code (training), or to those of
        the whole bank (the released setting for sampling). Only mode 'bank' retrieves.
      drop: True where the condition is dropped. Prior and retrieved code then count as
        zero (but see `null_kv`); the loss remains that of the prior.

    Returns:
      The tokens, and the look-up: its loss is 0 without retrieval.
    """

    def zero_dropped(x: Array) -> Array:
      return x if drop is None else jnp.where(drop[:, None], 0, x)

    # 1. Project the prior to tokens, and look it up.
    tokens = self.emo_linear(zero_dropped(prior)[:, None])[:, 0]
    code, vq = self._look_up(prior)
    if self.attention is None:
      return tokens, vq
    assert self.kv_tokens_linear is not None and self.codebook is not None

    # 2. Attend to the tokens of the code, or of the whole bank.
    if retrieval and code is not None:
      context = self.kv_tokens_linear(zero_dropped(code)[:, None])[:, 0]
    else:
      bank = self.kv_tokens_linear(self.codebook.codes[None])
      context = bank.reshape(1, -1, self.config.dim)
      vq = vq._replace(loss=jnp.zeros(()))
    out = self.attention(tokens, context)

    # 3. Let dropped rows attend to the bank if that is the null condition.
    if drop is not None and retrieval and self.config.null_kv == 'bank':
      out = jnp.where(drop[:, None, None], self.null_tokens(), out)
    return out, vq

  def _look_up(
    self, prior: Float[Array, 'B d_s']
  ) -> tuple[Float[Array, 'B D'] | None, VQ]:
    """Looks priors up in the bank; without one there is no code."""
    if self.config.mode == 'bank':
      assert self.codebook is not None
      return self.codebook(prior)
    nothing = VQ(
      loss=jnp.zeros(()),
      indices=jnp.zeros(0, jnp.int32),
      z=jnp.zeros((0, self.config.dim)),
      error=jnp.zeros(()),
    )
    return None, nothing

  def null_tokens(self, retrieval: bool = False) -> Float[Array, 'tokens dim']:
    """Computes the tokens of "no emotion" in sampling, a constant of the weights.

    The reference implementation calls the model on a zero prior, as on any other. With
    `retrieval` it attends to the code nearest to the projection of zero, otherwise to
    the whole bank. Nothing is masked, unlike in training, where a dropped emotion has a
    zero code (`drop`). `null_kv` may ask for one of the two everywhere.
    """
    zero_prior = jnp.zeros((1, self.config.prior_dim))
    if self.config.null_kv == 'zeros':
      tokens, _ = self(zero_prior, retrieval=True, drop=jnp.ones(1, bool))
    else:
      looked_up = retrieval and self.config.null_kv == 'released'
      tokens, _ = self(zero_prior, looked_up)
    return tokens[0]

  def classify(
    self,
    features: Float[Array, 'N h w classifier_in'],
    key: Key[Array, ''] | None = None,
  ) -> Float[Array, 'N num_classes']:
    """Computes emotion logits of feature maps.

    Args:
      features: output of the UNet's middle block, a row per frame.
      key: turns dropout on.
    """
    return self.classifier(features, key)

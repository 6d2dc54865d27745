"""CLIP's vision tower with projection (Radford et al. 2021, arXiv:2103.00020)."""

from collections.abc import Callable
import dataclasses
import functools

from flax import nnx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models.encoder_attention import EncoderAttention
from dicetalk_jax.models.layers import LayerNorm, gelu
from dicetalk_jax.models.parameters import ModelConfig


def quick_gelu(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """OpenAI's approximation of the GELU."""
  return x * nnx.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'gelu': gelu,
  'quick_gelu': quick_gelu,
}


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig(ModelConfig):
  """Reads the published `config.json` of an image encoder.

  The defaults are ViT-H/14.
  """

  hidden_size: int = 1280
  intermediate_size: int = 5120
  projection_dim: int = 1024
  num_hidden_layers: int = 32
  num_attention_heads: int = 16
  num_channels: int = 3
  image_size: int = 224
  patch_size: int = 14
  hidden_act: str = 'gelu'
  layer_norm_eps: float = 1e-5


class Embeddings(nnx.Module):
  """Class token and patches, with learned positions."""

  def __init__(
    self, config: CLIPVisionConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    width = config.hidden_size
    patch = (config.patch_size, config.patch_size)
    positions = (config.image_size // config.patch_size) ** 2 + 1
    normal = nnx.initializers.normal(stddev=0.02)
    self.class_embedding = nnx.Param(normal(rngs.params(), (width,)))
    self.patch_embedding = nnx.Conv(
      config.num_channels,
      width,
      patch,
      strides=patch,
      padding='VALID',
      use_bias=False,
      dtype=dtype,
      rngs=rngs,
    )
    self.position_embedding = nnx.Embed(
      positions,
      width,
      embedding_init=normal,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, pixels: Float[Array, 'B S S 3']) -> Float[Array, 'B T C']:
    """Returns the class token, then the patches row by row."""
    patches = self.patch_embedding(pixels)
    b, _, _, width = patches.shape
    class_token = self.class_embedding[...].astype(patches.dtype)
    first = jnp.broadcast_to(class_token, (b, 1, width))
    tokens = jnp.concatenate([first, patches.reshape(b, -1, width)], axis=1)
    return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class MLP(nnx.Module):
  """Two linear layers."""

  def __init__(
    self, config: CLIPVisionConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    self.fc1 = nnx.Linear(
      config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs
    )
    self.fc2 = nnx.Linear(
      config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs
    )
    self.hidden_act = config.hidden_act

  def __call__(self, x: Float[Array, 'B T C']) -> Float[Array, 'B T C']:
    return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class EncoderLayer(nnx.Module):
  """Pre-norm transformer layer."""

  def __init__(
    self, config: CLIPVisionConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    norm = functools.partial(
      LayerNorm,
      config.hidden_size,
      epsilon=config.layer_norm_eps,
      dtype=dtype,
      rngs=rngs,
    )
    self.layer_norm1 = norm()
    self.self_attn = EncoderAttention(
      config.hidden_size, config.num_attention_heads, dtype=dtype, rngs=rngs
    )
    self.layer_norm2 = norm()
    self.mlp = MLP(config, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, 'B T C']) -> Float[Array, 'B T C']:
    x = x + self.self_attn(self.layer_norm1(x))
    return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
  """The transformer layers."""

  def __init__(
    self, config: CLIPVisionConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    self.layers = nnx.List(
      [
        EncoderLayer(config, dtype=dtype, rngs=rngs)
        for _ in range(config.num_hidden_layers)
      ]
    )

  def __call__(self, x: Float[Array, 'B T C']) -> Float[Array, 'B T C']:
    for layer in self.layers:
      x = layer(x)
    return x


class VisionTransformer(nnx.Module):
  """The tower without its projection."""

  def __init__(
    self, config: CLIPVisionConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    norm = functools.partial(
      LayerNorm,
      config.hidden_size,
      epsilon=config.layer_norm_eps,
      dtype=dtype,
      rngs=rngs,
    )
    self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
    self.pre_layrnorm = norm()  # the published spelling
    self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
    self.post_layernorm = norm()

  def __call__(self, pixels: Float[Array, 'B S S 3']) -> Float[Array, 'B C']:
    """Returns the normed class token."""
    x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
    class_token: Array = self.post_layernorm(x[:, 0])
    return class_token


class CLIPVision(nnx.Module):
  """An image to its one context token (published `image_encoder`)."""

  def __init__(
    self, config: CLIPVisionConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    self.vision_model = VisionTransformer(config, dtype=dtype, rngs=rngs)
    self.visual_projection = nnx.Linear(
      config.hidden_size, config.projection_dim, use_bias=False, dtype=dtype, rngs=rngs
    )

  def __call__(
    self, pixels: Float[Array, 'B S S 3']
  ) -> Float[Array, 'B projection_dim']:
    """Embeds images.

    Args:
      pixels: `[B,image_size,image_size,num_channels]`, normalised with CLIP's mean and
        deviation.

    Returns:
      Embeddings, not normalised to unit length.
    """
    return self.visual_projection(self.vision_model(pixels))

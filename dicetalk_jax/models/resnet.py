"""Residual blocks over space and time, and the two resampling convolutions.

Shared by UNet and VAE.
"""

from collections.abc import Callable
import functools

from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
import jax
from jax import lax
import jax.numpy as jnp

from dicetalk_jax.models import target
from dicetalk_jax.models.layers import GroupNorm

Conv3x3 = functools.partial(nnx.Conv, kernel_size=(3, 3), padding=1)


class TemporalConv(nnx.Module):
  """Convolution over three neighbouring frames, zeros beyond both ends of the clip.

  The kernel keeps the published 3-D form (3, 1, 1, cin, cout), but no 3-D convolution
  runs: they are slow. A new layer begins frame by frame: `kernel_init` draws the middle
  of the kernel, the weights of the neighbours are zero.
  """

  def __init__(
    self, cin: int, cout: int, *, kernel_init=default_kernel_init, dtype=None, rngs
  ):
    middle = kernel_init(rngs.params(), (1, 1, 1, cin, cout))
    self.kernel = nnx.Param(jnp.pad(middle, ((1, 1), *[(0, 0)] * 4)))
    self.bias = nnx.Param(jnp.zeros(cout))
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    """x `[B,F,H,W,cin]`; returns `[B,F,H,W,cout]`."""
    x, kernel, bias = dtypes.promote_dtype(
      (x, self.kernel[...], self.bias[...]), dtype=self.dtype
    )
    form = temporal_form(target.current().platform)
    y = form(x.reshape(*x.shape[:2], -1, x.shape[-1]), kernel[:, 0, 0])
    return y.reshape(*x.shape[:-1], -1) + bias


def temporal_form(platform: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The form of the convolution that suits a platform (`target.PLATFORMS`)."""
  # On CPUs the gradients of the convolution take several times as long.
  return as_product if platform == 'cpu' else as_convolution


def as_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves x `[B,F,P,cin]` with kernel `[3,cin,cout]` along F, as a 2-D
  convolution.
  """
  return lax.conv_general_dilated(
    x,
    kernel[:, None],
    window_strides=(1, 1),
    padding=((1, 1), (0, 0)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def as_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same, as one matrix product of each frame joined with its neighbours."""
  frames = x.shape[1]
  x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
  neighbours = jnp.concatenate([x[:, i : i + frames] for i in range(3)], axis=-1)
  return neighbours @ kernel.reshape(-1, kernel.shape[-1])


class ResnetBlock(nnx.Module):
  """Two convolutions with a residual path, in space or in time according to `conv`.

  Statistics of the norms run over all axes between the first and the last: pass
  `[B*F,H,W,C]` for per-frame statistics, `[B,F,H,W,C]` for those of a whole window.
  """

  def __init__(
    self,
    cin: int,
    cout: int,
    *,
    conv: Callable[..., nnx.Module] = Conv3x3,
    groups: int = 32,
    epsilon: float = 1e-6,
    temb_channels: int | None = None,
    dtype=None,
    rngs,
  ):
    norm = functools.partial(
      GroupNorm, num_groups=groups, epsilon=epsilon, dtype=dtype, rngs=rngs
    )
    self.norm1 = norm(cin)
    self.conv1 = conv(cin, cout, dtype=dtype, rngs=rngs)
    self.time_emb_proj = (
      None
      if temb_channels is None
      else nnx.Linear(temb_channels, cout, dtype=dtype, rngs=rngs)
    )
    self.norm2 = norm(cout)
    self.conv2 = conv(cout, cout, dtype=dtype, rngs=rngs)
    self.conv_shortcut = (
      None if cin == cout else nnx.Conv(cin, cout, (1, 1), dtype=dtype, rngs=rngs)
    )

  def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
    """Computes the block.

    Args:
      x: `[N,...,cin]`.
      temb: `[B,temb_channels]` with N a multiple of B; each row serves N/B consecutive
        rows of x. Needed if and only if the block was made with `temb_channels`.

    Returns:
      `[N,...,cout]`.
    """
    h = self.conv1(nnx.silu(self.norm1(x)))
    if self.time_emb_proj is not None:
      shift = self.time_emb_proj(nnx.silu(temb))
      shift = jnp.repeat(shift, len(h) // len(shift), axis=0)
      h += jnp.expand_dims(shift, range(1, h.ndim - 1))
    h = self.conv2(nnx.silu(self.norm2(h)))
    return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Blend(nnx.Module):
  """Learned mixture of the spatial and the temporal path (published name `time_mixer`).

  With s = sigmoid(mix_factor) the result is s*spatial + (1-s)*temporal; `switched`
  exchanges the two weights, as in the VAE decoder.
  """

  def __init__(self, mix_factor: float = 0.5, *, switched: bool = False):
    self.mix_factor = nnx.Param(
      jnp.full(1, mix_factor, jnp.float32)
    )  # a weak type would compile training twice
    self.switched = switched

  def __call__(self, spatial: jax.Array, temporal: jax.Array) -> jax.Array:
    s = nnx.sigmoid(self.mix_factor[...].astype(jnp.float32)).astype(spatial.dtype)
    if self.switched:
      spatial, temporal = temporal, spatial
    return s * spatial + (1 - s) * temporal


class SpatioTemporalResBlock(nnx.Module):
  """A spatial residual block, a temporal one on its output, and the blend of both."""

  def __init__(
    self,
    cin: int,
    cout: int,
    *,
    groups: int = 32,
    epsilon: float = 1e-6,
    temporal_epsilon: float | None = None,
    temb_channels: int | None = None,
    mix_factor: float = 0.5,
    switched: bool = False,
    dtype=None,
    rngs,
  ):
    """`temporal_epsilon` None means `epsilon`; the VAE has its own and `switched`
    blends without `temb_channels`.
    """
    block = functools.partial(
      ResnetBlock, groups=groups, temb_channels=temb_channels, dtype=dtype, rngs=rngs
    )
    self.spatial_res_block = block(cin, cout, epsilon=epsilon)
    self.temporal_res_block = block(
      cout,
      cout,
      conv=TemporalConv,
      epsilon=epsilon if temporal_epsilon is None else temporal_epsilon,
    )
    self.time_mixer = Blend(mix_factor, switched=switched)

  def __call__(self, x: jax.Array, temb: jax.Array | None = None) -> jax.Array:
    """x `[B,F,H,W,cin]`, temb `[B,temb_channels]` or None; returns `[B,F,H,W,cout]`."""
    spatial = self.spatial_res_block(x.reshape(-1, *x.shape[2:]), temb)
    spatial = spatial.reshape(*x.shape[:2], *spatial.shape[1:])
    return self.time_mixer(spatial, self.temporal_res_block(spatial, temb))


class Downsample(nnx.Module):
  """Halves height and width by a strided convolution."""

  def __init__(self, channels: int, *, padding=1, dtype=None, rngs):
    """`padding`: 1 on every side in the UNet; ((0, 1), (0, 1)) in the VAE encoder."""
    self.conv = nnx.Conv(
      channels, channels, (3, 3), strides=2, padding=padding, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """x `[...,H,W,C]`; returns `[...,H/2,W/2,C]`."""
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles height and width: nearest neighbour, then a convolution."""

  def __init__(self, channels: int, *, dtype=None, rngs):
    self.conv = Conv3x3(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """x `[...,H,W,C]`; returns `[...,2H,2W,C]`."""
    return self.conv(x.repeat(2, axis=-3).repeat(2, axis=-2))

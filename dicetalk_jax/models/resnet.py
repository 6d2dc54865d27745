"""Residual blocks over space and time, and the two resampling convolutions.

Shared by UNet and VAE.
"""

from collections.abc import Callable
import functools
from typing import Any, Literal

from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init
import jax
from jax import lax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models import target
from dicetalk_jax.models.layers import GroupNorm

Conv3x3 = functools.partial(nnx.Conv, kernel_size=(3, 3), padding=1)


class TemporalConv(nnx.Module):
  """Convolution over three neighbouring frames, zeros beyond both ends of the clip.

  The kernel keeps the published 3-D form (3, 1, 1, cin, cout), but no 3-D convolution
  runs: they are slow. A new layer treats every frame by itself: `kernel_init` draws the
  middle of the kernel, the weights of the neighbours are zero.
  """

  def __init__(
    self,
    cin: int,
    cout: int,
    *,
    kernel_init: jax.nn.initializers.Initializer = default_kernel_init,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    middle = kernel_init(rngs.params(), (1, 1, 1, cin, cout))
    self.kernel = nnx.Param(jnp.pad(middle, ((1, 1), *[(0, 0)] * 4)))
    self.bias = nnx.Param(jnp.zeros(cout))
    self.dtype = dtype

  def __call__(
    self, x: Float[Array, 'B F *pixels cin'], scale: Float[Array, ' 1'] | None = None
  ) -> Float[Array, 'B F *pixels cout']:
    """Convolves along F, and multiplies the result by `scale`."""
    kernel, bias = self.kernel[...], self.bias[...]
    if scale is not None:
      kernel, bias = kernel * scale, bias * scale
    x, kernel, bias = dtypes.promote_dtype((x, kernel, bias), dtype=self.dtype)
    convolve = temporal_form(target.current().platform)
    y = convolve(x.reshape(*x.shape[:2], -1, x.shape[-1]), kernel[:, 0, 0])
    return y.reshape(*x.shape[:-1], -1) + bias


def temporal_form(platform: str) -> Callable[[Array, Array], Array]:
  """Chooses the form of the convolution for a platform (`target.PLATFORMS`)."""
  # On CPUs the gradients of the convolution take several times as long.
  return as_product if platform == 'cpu' else as_convolution


def as_convolution(
  x: Float[Array, 'B F P cin'], kernel: Float[Array, '3 cin cout']
) -> Float[Array, 'B F P cout']:
  """Convolves along F, as a 2-D convolution."""
  return lax.conv_general_dilated(
    x,
    kernel[:, None],
    window_strides=(1, 1),
    padding=((1, 1), (0, 0)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )


def as_product(
  x: Float[Array, 'B F P cin'], kernel: Float[Array, '3 cin cout']
) -> Float[Array, 'B F P cout']:
  """Convolves along F, as a matrix product of each frame joined with its neighbours."""
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
    conv: Callable[..., Any] = Conv3x3,
    groups: int = 32,
    epsilon: float = 1e-6,
    temb_channels: int | None = None,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    norm = functools.partial(
      GroupNorm, num_groups=groups, epsilon=epsilon, dtype=dtype, rngs=rngs
    )
    self.norm1 = norm(cin)
    self.conv1 = conv(cin, cout, dtype=dtype, rngs=rngs)
    if temb_channels is None:
      self.time_emb_proj = None
    else:
      self.time_emb_proj = nnx.Linear(temb_channels, cout, dtype=dtype, rngs=rngs)
    self.norm2 = norm(cout)
    self.conv2 = conv(cout, cout, dtype=dtype, rngs=rngs)
    if cin == cout:
      self.conv_shortcut = None
    else:
      self.conv_shortcut = nnx.Conv(cin, cout, (1, 1), dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, 'N *shape cin'],
    temb: Float[Array, 'B temb_channels'] | None = None,
  ) -> Float[Array, 'N *shape cout']:
    """Computes the block.

    Args:
      x: N is a multiple of B.
      temb: each row serves N/B consecutive rows of x. Needed if and only if the block
        was made with `temb_channels`.
    """
    residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
    out: Array = self.branch(x, temb) + residual
    return out

  def branch(
    self,
    x: Float[Array, 'N *shape cin'],
    temb: Float[Array, 'B temb_channels'] | None = None,
    **last: Any,
  ) -> Float[Array, 'N *shape cout']:
    """Computes what the block adds to its residual; `last` is for the last layer."""
    h = self.conv1(nnx.silu(self.norm1(x)))
    if self.time_emb_proj is not None:
      assert temb is not None, 'the block was made with temb_channels'
      shift = self.time_emb_proj(nnx.silu(temb))
      shift = jnp.repeat(shift, len(h) // len(shift), axis=0)
      h = _add_shift(h, jnp.expand_dims(shift, range(1, h.ndim - 1)))
    out: Array = self.conv2(nnx.silu(self.norm2(h)), **last)
    return out


def _add_shift(
  h: Float[Array, 'N *shape C'], shift: Float[Array, 'N *_ C']
) -> Float[Array, 'N *shape C']:
  """Adds a vector to all pixels of an image, after a convolution."""
  if target.current().platform == 'cuda':
    # Otherwise the compiler makes a whole image of the vector for cuDNN to add. The
    # norm that follows adds it for free.
    h = lax.optimization_barrier(h)
  return h + shift


class Blend(nnx.Module):
  """Learned mixture of the spatial and the temporal path (published name `time_mixer`).

  With s = sigmoid(mix_factor) the result is s*spatial + (1-s)*temporal; `switched`
  exchanges the two weights, as in the VAE decoder.
  """

  def __init__(self, mix_factor: float = 0.5, *, switched: bool = False):
    # Without the type it would be a weak one, and training would compile twice.
    self.mix_factor = nnx.Param(jnp.full(1, mix_factor, jnp.float32))
    self.switched = switched

  def __call__(
    self, spatial: Float[Array, '*shape'], temporal: Float[Array, '*shape']
  ) -> Float[Array, '*shape']:
    # In float32: the gradient of the weight is a sum over all features.
    weight = self.temporal_weight()
    blended = (1 - weight) * spatial + weight * temporal
    return blended.astype(spatial.dtype)

  def temporal_weight(self) -> Float[Array, ' 1']:
    """The weight of the temporal path."""
    s = nnx.sigmoid(self.mix_factor[...].astype(jnp.float32))
    return s if self.switched else 1 - s


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
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    """Constructs the block.

    Args:
      cin, cout: channels.
      groups: of the norms.
      epsilon: of the norms.
      temporal_epsilon: of the temporal block's norms, as in the VAE; None means
        `epsilon`.
      temb_channels: of the time embedding; None for a block without, as in the VAE.
      mix_factor, switched: see `Blend`.
      dtype: compute type.
      rngs: keys of the initial parameters.
    """
    block = functools.partial(
      ResnetBlock, groups=groups, temb_channels=temb_channels, dtype=dtype, rngs=rngs
    )
    if temporal_epsilon is None:
      temporal_epsilon = epsilon
    self.spatial_res_block = block(cin, cout, epsilon=epsilon)
    self.temporal_res_block = block(
      cout, cout, conv=TemporalConv, epsilon=temporal_epsilon
    )
    self.time_mixer = Blend(mix_factor, switched=switched)

  def __call__(
    self,
    x: Float[Array, 'B F H W cin'],
    temb: Float[Array, 'B temb_channels'] | None = None,
  ) -> Float[Array, 'B F H W cout']:
    """See `ResnetBlock` for `temb`."""
    spatial = self.spatial_res_block(x.reshape(-1, *x.shape[2:]), temb)
    # One axis for all pixels: a compiler joins the sum below to the convolution only if
    # no reshape is between them.
    spatial = spatial.reshape(*x.shape[:2], -1, spatial.shape[-1])
    # The temporal block adds a branch to its input, so to blend it with that input is
    # to scale the branch. Its last convolution does that for nothing.
    weight = self.time_mixer.temporal_weight()
    blended = self.temporal_res_block.branch(spatial, temb, scale=weight) + spatial
    return blended.reshape(*x.shape[:-1], -1)


class Downsample(nnx.Module):
  """Halves height and width by a strided convolution."""

  def __init__(
    self,
    channels: int,
    *,
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 1,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    """`padding`: 1 on every side in the UNet; ((0, 1), (0, 1)) in the VAE encoder."""
    self.conv = nnx.Conv(
      channels, channels, (3, 3), strides=2, padding=padding, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: Float[Array, '*rows H W C']) -> Float[Array, '*rows H/2 W/2 C']:
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles height and width: nearest neighbour, then a convolution."""

  def __init__(self, channels: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
    self.conv = Conv3x3(channels, channels, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, '*rows H W C']) -> Float[Array, '*rows 2*H 2*W C']:
    if upsampling_form(target.current().platform) == 'repeat':
      return self.conv(x.repeat(2, axis=-3).repeat(2, axis=-2))
    assert self.conv.bias is not None
    x, kernel, bias = dtypes.promote_dtype(
      (x, self.conv.kernel[...], self.conv.bias[...]), dtype=self.conv.dtype
    )
    y = upsample_transposed(x.reshape(-1, *x.shape[-3:]), kernel)
    return y.reshape(*x.shape[:-3], *y.shape[1:]) + bias


def upsampling_form(platform: str) -> Literal['repeat', 'transposed']:
  """Chooses the form of `Upsample` for a platform (`target.PLATFORMS`)."""
  # cuDNN runs a transposed convolution with 4/9 of the arithmetic. Elsewhere the
  # compiler would multiply the zeros between pixels.
  return 'transposed' if platform == 'cuda' else 'repeat'


def upsample_transposed(
  x: Float[Array, 'N H W cin'], kernel: Float[Array, '3 3 cin cout']
) -> Float[Array, 'N 2*H 2*W cout']:
  """Doubles height and width and convolves, in one transposed convolution.

  Repeating pixels is a transposed convolution with ones(2, 2). Its product with the
  3 x 3 kernel is a 4 x 4 kernel, of which every output pixel meets 2 x 2 weights.
  """
  # Turned around twice: that is how the compiler knows a transposed convolution.
  turned = jnp.flip(kernel, (0, 1))
  for axis in (0, 1):
    before = [(0, 0)] * 4
    after = [(0, 0)] * 4
    before[axis] = (1, 0)
    after[axis] = (0, 1)
    turned = jnp.pad(turned, before) + jnp.pad(turned, after)
  return lax.conv_general_dilated(
    x,
    jnp.flip(turned, (0, 1)),
    window_strides=(1, 1),
    padding=((2, 2), (2, 2)),
    lhs_dilation=(2, 2),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )

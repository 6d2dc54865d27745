"""The pose guider: turns the face box, as an image, into features that join the UNet
after its first convolution.
"""

import dataclasses
import itertools

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dicetalk_jax.models.parameters import ModelConfig
from dicetalk_jax.models.resnet import Conv3x3


@dataclasses.dataclass(frozen=True)
class PoseGuiderConfig(ModelConfig):
  """Sizes of the pose guider; the defaults are those of the published file.

  It reduces height and width by 2**(len(block_out_channels) - 1), which must be the
  VAE's factor.
  """

  conditioning_embedding_channels: int = 320
  conditioning_channels: int = 3
  block_out_channels: tuple[int, ...] = (16, 32, 96, 256)


class PoseGuider(nnx.Module):
  """Convolutions, frame by frame (published file `pose_guider.pth`).

  A new one returns zeros, so it starts without effect.
  """

  def __init__(
    self, config: PoseGuiderConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    widths = config.block_out_channels
    zeros = nnx.initializers.zeros
    self.conv_in = Conv3x3(
      config.conditioning_channels, widths[0], dtype=dtype, rngs=rngs
    )
    self.blocks: nnx.List[nnx.Conv] = nnx.List([])
    for cin, cout in itertools.pairwise(widths):
      self.blocks.append(Conv3x3(cin, cin, dtype=dtype, rngs=rngs))
      self.blocks.append(Conv3x3(cin, cout, strides=2, dtype=dtype, rngs=rngs))
    self.conv_out = Conv3x3(
      widths[-1],
      config.conditioning_embedding_channels,
      kernel_init=zeros,
      bias_init=zeros,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, mask: Float[Array, '*B H W 3']) -> Float[Array, '*B _ _ C0']:
    """Computes features of the mask, which is in [0,1].

    Returns:
      `[B,F,H/8,W/8,320]` for the published widths.
    """
    x = nnx.silu(self.conv_in(mask))
    for block in self.blocks:
      x = nnx.silu(block(x))
    return self.conv_out(x)

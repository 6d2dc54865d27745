"""MTCNN (Zhang et al., arXiv 1604.02878): three small networks that find faces.

The first proposes boxes everywhere in an image, the second and the third look at each
of them again. Attributes are named as in the package `mtcnn` 1.0.0, whose weights
`dicetalk_jax/detect/mtcnn.safetensors` holds. `dicetalk_jax/detect/mtcnn.py` calls the
networks one after the other.

All inputs are RGB, (x - 127.5) / 128. Offsets of a box are those of its corners x0, y0,
x1, y1 in sides of the box.
"""

import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dicetalk_jax.models.layers import PReLU


class Look(NamedTuple):
  """What a network says about boxes.

  Attributes:
    score: probability of a face, `[...]`.
    offsets: from the box to the face, `[...,4]`.
    landmarks: five x, then five y, in sides of the box, `[...,10]`; the first two
      networks have none.
  """

  score: Any
  offsets: Any
  landmarks: Any = None


def _pool(x: Array, side: int, padding: str) -> Array:
  pooled: Array = nnx.max_pool(x, (side, side), strides=(2, 2), padding=padding)
  return pooled


def _flat(x: Float[Array, 'B H W C']) -> Float[Array, 'B N']:
  """Flattens features as the weights expect them: columns first, then rows."""
  return x.swapaxes(1, 2).reshape(len(x), -1)


def _face(logits: Float[Array, '*shape 2']) -> Float[Array, '*shape']:
  """Probability of the second class."""
  return jax.nn.softmax(logits.astype(jnp.float32))[..., 1]


class PNet(nnx.Module):
  """Proposes boxes of 12 pixels, at every second row and column."""

  def __init__(self, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
    conv = functools.partial(nnx.Conv, padding='VALID', dtype=dtype, rngs=rngs)
    self.conv1 = conv(3, 10, (3, 3))
    self.prelu1 = PReLU(10)
    self.conv2 = conv(10, 16, (3, 3))
    self.prelu2 = PReLU(16)
    self.conv3 = conv(16, 32, (3, 3))
    self.prelu3 = PReLU(32)
    self.conv4_1 = conv(32, 4, (1, 1))
    self.conv4_2 = conv(32, 2, (1, 1))

  def __call__(
    self, image: Float[Array, 'B H W 3'], valid: Bool[Array, 'H W'] | None = None
  ) -> Look:
    """Scores `[B,h,w]` and offsets `[B,h,w,4]`, h = ceil((H - 2) / 2) - 4.

    Args:
      image: one image, or several side by side, which begin in even rows and columns.
      valid: where the first convolution, of 3x3 pixels from there on, sees pixels of
        one of them only.
    """
    x = self.prelu1(self.conv1(image))
    if valid is not None:
      # An image of odd width ends in the middle of a pool.
      x = jnp.where(valid[: x.shape[1], : x.shape[2], None], x, jnp.float32(-1e9))
    x = _pool(x, 2, 'SAME')
    x = self.prelu2(self.conv2(x))
    x = self.prelu3(self.conv3(x))
    return Look(_face(self.conv4_2(x)), self.conv4_1(x))


class RNet(nnx.Module):
  """Looks at boxes of 24 pixels."""

  def __init__(self, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
    conv = functools.partial(nnx.Conv, padding='VALID', dtype=dtype, rngs=rngs)
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    self.conv1 = conv(3, 28, (3, 3))
    self.prelu1 = PReLU(28)
    self.conv2 = conv(28, 48, (3, 3))
    self.prelu2 = PReLU(48)
    self.conv3 = conv(48, 64, (2, 2))
    self.prelu3 = PReLU(64)
    self.fc4 = linear(576, 128)
    self.prelu4 = PReLU(128)
    self.fc5_1 = linear(128, 4)
    self.fc5_2 = linear(128, 2)

  def __call__(self, crops: Float[Array, 'B 24 24 3']) -> Look:
    x = _pool(self.prelu1(self.conv1(crops)), 3, 'SAME')
    x = _pool(self.prelu2(self.conv2(x)), 3, 'VALID')
    x = self.prelu3(self.conv3(x))
    x = self.prelu4(self.fc4(_flat(x)))
    return Look(_face(self.fc5_2(x)), self.fc5_1(x))


class ONet(nnx.Module):
  """Looks at boxes of 48 pixels, and finds the landmarks in them."""

  def __init__(self, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
    conv = functools.partial(nnx.Conv, padding='VALID', dtype=dtype, rngs=rngs)
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    self.conv1 = conv(3, 32, (3, 3))
    self.prelu1 = PReLU(32)
    self.conv2 = conv(32, 64, (3, 3))
    self.prelu2 = PReLU(64)
    self.conv3 = conv(64, 64, (3, 3))
    self.prelu3 = PReLU(64)
    self.conv4 = conv(64, 128, (2, 2))
    self.prelu4 = PReLU(128)
    self.fc5 = linear(1152, 256)
    self.prelu5 = PReLU(256)
    self.fc6_1 = linear(256, 4)
    self.fc6_2 = linear(256, 10)
    self.fc6_3 = linear(256, 2)

  def __call__(self, crops: Float[Array, 'B 48 48 3']) -> Look:
    x = _pool(self.prelu1(self.conv1(crops)), 3, 'SAME')
    x = _pool(self.prelu2(self.conv2(x)), 3, 'VALID')
    x = _pool(self.prelu3(self.conv3(x)), 2, 'SAME')
    x = self.prelu4(self.conv4(x))
    x = self.prelu5(self.fc5(_flat(x)))
    return Look(_face(self.fc6_3(x)), self.fc6_1(x), self.fc6_2(x))


class MTCNN(nnx.Module):
  """The three networks; they have one published size."""

  def __init__(self, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
    self.pnet = PNet(dtype=dtype, rngs=rngs)
    self.rnet = RNet(dtype=dtype, rngs=rngs)
    self.onet = ONet(dtype=dtype, rngs=rngs)

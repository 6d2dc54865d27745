"""YOLOv5m-face, the face detector of the reference implementation.

Published file `yoloface_v5m.pt`; the name of the component is `face_detector`. Its
convolutions carry the batch norms that followed them in training, as in the published
file. `dicetalk_jax/detect/yolo_face.py` prepares images for it.
"""

from collections.abc import Mapping
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dicetalk_jax.models.parameters import ModelConfig

STRIDES = (8, 16, 32)  # pixels per cell of the three levels
MULTIPLE = max(STRIDES)  # height and width must be multiples of it
ROW = 16  # numbers of a row: box, objectness, five landmarks, class

# Where an image of a batch has pixels, by height and width of the features: those of
# images that are smaller than the others are zero elsewhere.
Masks = Mapping[tuple[int, int], Array]


@dataclasses.dataclass(frozen=True)
class YoloFaceConfig(ModelConfig):
  """Sizes of the network; the defaults are those of the published file.

  Attributes:
    widths: channels at strides 4 (stem, then C3), 8, 16 and 32.
    depths: bottlenecks of the C3 blocks at strides 4, 8, 16 and 32; those of the head
      have as many as the last.
    anchors: width and height in pixels, three for each of `STRIDES`.
  """

  widths: tuple[int, int, int, int, int] = (48, 96, 192, 384, 768)
  depths: tuple[int, int, int, int] = (2, 6, 6, 2)
  anchors: tuple[tuple[tuple[float, float], ...], ...] = (
    ((4, 5), (8, 10), (13, 16)),
    ((23, 29), (43, 55), (73, 105)),
    ((146, 217), (231, 300), (335, 433)),
  )


def _masked(
  x: Float[Array, 'B H W C'], masks: Masks | None, fill: float = 0
) -> Float[Array, 'B H W C']:
  """Sets features where an image has no pixels.

  With zeros, a convolution sees the same as at the edge of an image without neighbours.
  """
  if masks is None:
    return x
  height, width = x.shape[1:3]
  return jnp.where(masks[height, width], x, jnp.asarray(fill, x.dtype))


class Conv(nnx.Module):
  """Convolution and SiLU."""

  def __init__(
    self,
    cin: int,
    cout: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    self.conv = nnx.Conv(
      cin,
      cout,
      (kernel, kernel),
      strides=stride,
      padding=kernel // 2,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(
    self, x: Float[Array, 'B _ _ cin'], masks: Masks | None = None
  ) -> Float[Array, 'B _ _ cout']:
    return _masked(nnx.silu(self.conv(x)), masks)


class Stem(nnx.Module):
  """A quarter of the height and width, by convolutions beside a pool."""

  def __init__(self, width: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
    conv = functools.partial(Conv, dtype=dtype, rngs=rngs)
    self.stem_1 = conv(3, width, 3, 2)
    self.stem_2a = conv(width, width // 2)
    self.stem_2b = conv(width // 2, width, 3, 2)
    self.stem_3 = conv(2 * width, width)

  def __call__(
    self, x: Float[Array, 'B H W 3'], masks: Masks | None = None
  ) -> Float[Array, 'B H/4 W/4 C']:
    x = self.stem_1(x, masks)
    convolved = self.stem_2b(self.stem_2a(x, masks), masks)
    pooled = nnx.max_pool(x, (2, 2), strides=(2, 2))
    return self.stem_3(jnp.concatenate([convolved, pooled], axis=-1), masks)


class Bottleneck(nnx.Module):
  """Two convolutions, and the input if `shortcut`."""

  def __init__(
    self,
    width: int,
    shortcut: bool,
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    self.cv1 = Conv(width, width, dtype=dtype, rngs=rngs)
    self.cv2 = Conv(width, width, 3, dtype=dtype, rngs=rngs)
    self.shortcut = shortcut

  def __call__(
    self, x: Float[Array, 'B H W C'], masks: Masks | None = None
  ) -> Float[Array, 'B H W C']:
    out = self.cv2(self.cv1(x, masks), masks)
    return x + out if self.shortcut else out


class C3(nnx.Module):
  """Bottlenecks beside a plain convolution, at half of the width each."""

  def __init__(
    self,
    cin: int,
    cout: int,
    depth: int,
    shortcut: bool = False,
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    half = cout // 2
    self.cv1 = Conv(cin, half, dtype=dtype, rngs=rngs)
    self.cv2 = Conv(cin, half, dtype=dtype, rngs=rngs)
    self.cv3 = Conv(cout, cout, dtype=dtype, rngs=rngs)
    self.m = nnx.List(
      [Bottleneck(half, shortcut, dtype=dtype, rngs=rngs) for _ in range(depth)]
    )

  def __call__(
    self, x: Float[Array, 'B H W cin'], masks: Masks | None = None
  ) -> Float[Array, 'B H W cout']:
    deep = self.cv1(x, masks)
    for bottleneck in self.m:
      deep = bottleneck(deep, masks)
    both = jnp.concatenate([deep, self.cv2(x, masks)], axis=-1)
    return self.cv3(both, masks)


class SPP(nnx.Module):
  """Largest values around each cell, at three sizes."""

  def __init__(self, width: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
    self.cv1 = Conv(width, width // 2, dtype=dtype, rngs=rngs)
    self.cv2 = Conv(2 * width, width, dtype=dtype, rngs=rngs)

  def __call__(
    self, x: Float[Array, 'B H W C'], masks: Masks | None = None
  ) -> Float[Array, 'B H W C']:
    x = self.cv1(x, masks)
    bounded = _masked(x, masks, fill=-jnp.inf)
    pools = [nnx.max_pool(bounded, (k, k), padding='SAME') for k in (3, 5, 7)]
    pools = [_masked(pool, masks) for pool in pools]
    return self.cv2(jnp.concatenate([x, *pools], axis=-1), masks)


class Upsample(nnx.Module):
  """Doubles height and width by repetition."""

  def __call__(
    self, x: Float[Array, 'B H W C'], masks: Masks | None = None
  ) -> Float[Array, 'B 2*H 2*W C']:
    del masks  # what is repeated has been masked
    return x.repeat(2, axis=1).repeat(2, axis=2)


class Concat(nnx.Module):
  """Features side by side."""

  def __call__(self, *parts: Float[Array, 'B H W _']) -> Float[Array, 'B H W _']:
    return jnp.concatenate(parts, axis=-1)


class Detect(nnx.Module):
  """The outputs of the three levels."""

  def __init__(
    self,
    widths: tuple[int, ...],
    anchors: tuple[tuple[tuple[float, float], ...], ...],
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
  ):
    self.anchors = anchors
    self.m = nnx.List(
      [
        nnx.Conv(width, len(own) * ROW, (1, 1), dtype=dtype, rngs=rngs)
        for width, own in zip(widths, anchors)
      ]
    )

  def __call__(
    self, *levels: Float[Array, 'B _ _ _']
  ) -> tuple[Float[Array, 'B A _ _ 16'], ...]:
    out = []
    for x, head, anchors in zip(levels, self.m, self.anchors):
      rows = head(x).reshape(*x.shape[:3], len(anchors), ROW)
      out.append(rows.transpose(0, 3, 1, 2, 4))
    return tuple(out)


class YoloFace(nnx.Module):
  """The network; its modules are numbered as in the published file."""

  def __init__(
    self, config: YoloFaceConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
  ):
    conv = functools.partial(Conv, dtype=dtype, rngs=rngs)
    c3 = functools.partial(C3, dtype=dtype, rngs=rngs)
    stem, w4, w8, w16, w32 = config.widths
    d4, d8, d16, d32 = config.depths
    self.model = nnx.List(
      [
        # 0 to 9: from the image to stride 32
        Stem(stem, dtype=dtype, rngs=rngs),
        c3(stem, w4, d4, shortcut=True),
        conv(w4, w8, 3, 2),
        c3(w8, w8, d8, shortcut=True),
        conv(w8, w16, 3, 2),
        c3(w16, w16, d16, shortcut=True),
        conv(w16, w32, 3, 2),
        SPP(w32, dtype=dtype, rngs=rngs),
        c3(w32, w32, d32),
        conv(w32, w16),
        # 10 to 16: up to stride 8
        Upsample(),
        Concat(),
        c3(2 * w16, w16, d32),
        conv(w16, w8),
        Upsample(),
        Concat(),
        c3(2 * w8, w8, d32),
        # 17 to 22: down to stride 32
        conv(w8, w8, 3, 2),
        Concat(),
        c3(2 * w8, w16, d32),
        conv(w16, w16, 3, 2),
        Concat(),
        c3(2 * w16, w32, d32),
        # 23: the outputs
        Detect((w8, w16, w32), config.anchors, dtype=dtype, rngs=rngs),
      ]
    )
    self.anchors = config.anchors

  def __call__(
    self, image: Float[Array, 'B H W 3'], sizes: Int[Array, 'B 2'] | None = None
  ) -> tuple[Float[Array, 'B A _ _ 16'], ...]:
    """Computes the raw outputs of the three levels.

    Args:
      image: RGB in [0,1]; height and width are multiples of `MULTIPLE`.
      sizes: height and width of the images, multiples too, if some are smaller than
        the array. They lie at its upper left, and get the outputs that they would have
        alone.
    """
    masks = None
    if sizes is not None:
      masks = _make_masks(image.shape[1], image.shape[2], sizes)
      image = jnp.where(_mask(image.shape[1], image.shape[2], sizes), image, 0)
    model = self.model
    x = image
    outputs = []
    for module in model[:10]:
      x = module(x, masks)
      outputs.append(x)
    stride_8, stride_16, top = outputs[3], outputs[5], outputs[9]

    x = model[12](model[11](model[10](top), stride_16), masks)
    middle = model[13](x, masks)
    small = model[16](model[15](model[14](middle), stride_8), masks)
    medium = model[19](model[18](model[17](small, masks), middle), masks)
    large = model[22](model[21](model[20](medium, masks), top), masks)
    levels: tuple[Array, ...] = model[23](small, medium, large)
    return levels

  def decode(
    self, levels: tuple[Float[Array, 'B A _ _ 16'], ...]
  ) -> Float[Array, 'B N 16']:
    """Makes rows in pixels of the raw outputs: by level, anchor, y and x.

    Returns:
      centre x and y, width, height, objectness, x and y of five landmarks (left eye,
      right eye, nose, left and right corner of the mouth as seen in the image), and
      the probability of the class.
    """
    rows = []
    for raw, stride, anchors in zip(levels, STRIDES, self.anchors):
      count, height, width = raw.shape[1:4]
      y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing='ij')
      cell = jnp.stack([x, y], axis=-1).astype(jnp.float32)
      anchor = jnp.asarray(anchors, jnp.float32)[:, None, None]
      raw = raw.astype(jnp.float32)
      squashed = nnx.sigmoid(raw)
      centre = (2 * squashed[..., :2] - 0.5 + cell) * stride
      size = (2 * squashed[..., 2:4]) ** 2 * anchor
      landmarks = raw[..., 5:15] * jnp.tile(anchor, 5) + jnp.tile(cell * stride, 5)
      parts = [centre, size, squashed[..., 4:5], landmarks, squashed[..., 15:]]
      level = jnp.concatenate(parts, axis=-1)
      rows.append(level.reshape(len(raw), count * height * width, ROW))
    return jnp.concatenate(rows, axis=1)


def _mask(
  height: int, width: int, sizes: Int[Array, 'B 2']
) -> Bool[Array, 'B {height} {width} 1']:
  """Where images of these sizes have pixels."""
  rows = jnp.arange(height) < sizes[:, :1]
  columns = jnp.arange(width) < sizes[:, 1:]
  return (rows[:, :, None] & columns[:, None])[..., None]


def _make_masks(height: int, width: int, sizes: Int[Array, 'B 2']) -> Masks:
  """The mask of every stride."""
  masks = {}
  for stride in (2, 4, *STRIDES):
    shape = height // stride, width // stride
    masks[shape] = _mask(*shape, sizes // stride)
  return masks


def forward(
  model: YoloFace,
  image: Float[Array, 'B H W 3'],
  sizes: Int[Array, 'B 2'] | None = None,
) -> Float[Array, 'B N 16']:
  """From images to rows; see `YoloFace`."""
  with jax.default_matmul_precision('highest'):
    return model.decode(model(image, sizes))

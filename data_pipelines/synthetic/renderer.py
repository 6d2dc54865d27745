"""Paints one frame, from backdrop and back hair to front hair and sensor noise.

Only what moves is computed per frame, in windows around the facial features. The rest
is warped from baked textures.
"""

from collections.abc import Callable

import numpy as np

from data_pipelines.synthetic import bake, facial_features, geometry, projection
from data_pipelines.synthetic.geometry import Face
from data_pipelines.synthetic.identity import Identity
from data_pipelines.synthetic.painting import Patch, Texture, bump, smooth, tint, unit
from data_pipelines.synthetic.projection import Pose

# x, y, half-width, half-height in face units
Window = tuple[float, float, float, float]
# rows, columns of the image
Span = tuple[slice, slice]

_GRAIN = 1.2 / 255  # sensor noise, standard deviation
_HAIR_SOFTNESS = 0.012  # hair has no hard edge, face units
_SHADOW_TINT = (1.10, 0.97, 0.93)  # skin shadows are warm


class Renderer:
  """Draws frames of one person, `size` x `size` pixels."""

  def __init__(self, person: Identity, size: int):
    self._person, self._size = person, size
    self._layers = bake.bake(person, size)
    self._pixel = 1 / (projection.SCALE * size)
    self._axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(
      size
    )

  def __call__(self, face: Face, pose: Pose, grain: int = 0) -> np.ndarray:
    """Paints one frame: uint8 [size, size, 3]; `grain` selects the sensor noise."""
    p = self._person
    layers = self._layers
    canvas = layers.backdrop.copy()
    self._behind(canvas, pose)
    canvas[:, layers.body_row :] *= 1 - layers.body_alpha
    canvas[:, layers.body_row :] += layers.body

    head = self._head(canvas, face, pose)

    def span(window):
      return self._span(pose, window)

    def patch(window):
      return head.cut(span(window))

    low, high = p.chin + face.drop, geometry.CROWN_Y
    self._skin(
      patch((0.0, 0.5 * (low + high), p.face_width + 0.08, 0.5 * (low - high) + 0.09)),
      face,
      pose,
      span,
    )
    facial_features.paint_folds(patch, face)
    for eye in face.eyes:
      facial_features.paint_eye(patch(facial_features.eye_window(eye)), face, eye)
    facial_features.paint_mouth(patch(facial_features.mouth_window(face)), face)
    if layers.glasses is not None:
      window = (0.0, p.eye_y, p.face_width + 0.06, 0.26)
      self._glasses(patch(window), layers.glasses)
    if layers.front is not None:
      self._hair(patch(layers.front_window), layers.front)
    for brow in face.brows:  # over a fringe too: brows carry half of the expression
      facial_features.paint_brow(patch(facial_features.brow_window(brow)), face, brow)
    return self._develop(canvas, grain)

  def _span(self, pose: Pose, window: Window, z: float | None = None) -> Span:
    """Gives the part of the image around a window at depth z, or on the face.

    It works on plain floats: for a dozen windows per frame, tiny arrays would cost more
    than the pixels do.
    """
    cx, cy, rx, ry = window
    points = []
    for x, y in (
      (cx - rx, cy - ry),
      (cx + rx, cy - ry),
      (cx - rx, cy + ry),
      (cx + rx, cy + ry),
    ):
      depth = projection.skull_height(self._person, x, y) if z is None else z
      points.append(projection.project_points(pose, x, y, depth))
    u, v = zip(*points)
    return self._slice(v), self._slice(u)

  def _slice(self, t: tuple[float, ...]) -> slice:
    """Gives the pixels between the smallest and the largest image coordinate."""
    size = self._size
    first = max(0, int(min(t) * size) - 1)
    return slice(first, max(1, min(size, int(max(t) * size) + 2)))

  def _head(self, canvas: np.ndarray, face: Face, pose: Pose) -> Patch:
    """Makes the patch of everything that head and hair can touch."""
    wide = self._person.face_width + 0.24
    low = self._person.chin + face.drop + 0.06
    if self._person.hair_style == 'long':
      low = 1.36
    rows, columns = self._span(
      pose, (0.0, 0.5 * (low - 1.34), wide, 0.5 * (low + 1.34)), 0.0
    )
    x, y = projection.unproject(
      self._person, pose, self._axis[columns], self._axis[rows]
    )
    return Patch(
      canvas[:, rows, columns], x, y, (rows.start, columns.start), self._pixel
    )

  def _behind(self, canvas: np.ndarray, pose: Pose) -> None:
    """Paints ears and back hair, which lie on one plane behind the face."""
    wide = self._person.face_width + 0.20
    low = {'long': 1.38, 'bob': 0.82}.get(self._person.hair_style, 0.40)
    rows, columns = self._span(
      pose, (0.0, 0.5 * (low - 0.9), wide, 0.5 * (low + 0.9)), bake.BEHIND_Z
    )
    ((a, b), (c, d)), (x0, y0) = projection.plane_map(pose, bake.BEHIND_Z)
    u, v = self._axis[columns][None, :], self._axis[rows][:, None]
    x, y = a * u + b * v + x0, c * u + d * v + y0
    patch = Patch(
      canvas[:, rows, columns], x, y, (rows.start, columns.start), self._pixel
    )
    layer = self._layers.behind.sample(patch.x, patch.y)
    patch.paint(layer[1:], patch.inside(layer[0]))

  def _skin(
    self, patch: Patch, face: Face, pose: Pose, span: Callable[[Window], Span]
  ) -> None:
    """Paints the skin: the resting face, warped by jaw and sneer, then lit.

    Cheeks and chin swell.
    """
    p = self._person
    tip = projection.nose_tip(p)
    x, y = patch.x, patch.y
    rest = face.unstretch(y)
    if face.sneer > 0.02:  # the nose slides up
      at = patch.part(span((0.0, tip, 0.40, 0.30)))
      rest[at] += 0.030 * face.sneer * bump(x[at], y[at], 0.0, tip - 0.02, 0.17, 0.13)
    skin = self._layers.skin.sample(x, rest)
    distance, slope_x, slope_y, albedo = skin[0], skin[1], skin[2], skin[3:]
    mounds = [
      (side * 0.385, tip - 0.10 - 0.04 * a, 0.17, 0.13, 0.062 * a)
      for side, a in zip((-1.0, 1.0), face.cheek)
    ]
    mounds.append(
      (0.0, float(face.stretch(p.chin - 0.17)), 0.15, 0.09, 0.035 * face.boss)
    )
    for cx, cy, rx, ry, amount in mounds:
      if amount > 0.001:
        at = patch.part(span((cx, cy, 2.4 * rx, 2.4 * ry)))
        dx, dy = (x[at] - cx) * (1 / rx), (y[at] - cy) * (1 / ry)
        mound = np.exp(-(dx * dx + dy * dy)) * (-2 * amount)
        slope_x[at] += mound * dx * (1 / rx)
        slope_y[at] += mound * dy * (1 / ry)
    rim = 1 - 0.20 * np.exp(np.minimum(distance, 0) * (1 / 0.055))
    patch.paint(self._lit(albedo, slope_x, slope_y, rim, pose), patch.inside(distance))

  def _lit(self, albedo, slope_x, slope_y, rim, pose: Pose) -> np.ndarray:
    """Lights the skin: wrapped Lambert, warm ambient light and a small highlight.

    The normal is (-slope_x, -slope_y, 1).
    """
    light = self._person.light
    norm = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)

    def facing(v):
      return (v[2] - slope_x * v[0] - slope_y * v[1]) * norm

    diffuse = unit((facing(_to_head(light, pose)) + 0.22) * (1 / 1.22))
    shine = unit(facing(_to_head(_half_way(light), pose)))
    for _ in range(4):
      shine *= shine
    ambient = tint(tuple(min(0.9, self._person.ambient * k) for k in _SHADOW_TINT))
    return albedo * ((ambient + (1.06 - ambient) * diffuse) * rim) + 0.13 * shine

  def _hair(self, patch: Patch, texture: Texture) -> None:
    layer = texture.sample(patch.x, patch.y)
    patch.paint(layer[1:], unit(0.5 - layer[0] * (1 / (self._pixel + _HAIR_SOFTNESS))))

  def _glasses(self, patch: Patch, texture: Texture) -> None:
    frame, lens = texture.sample(patch.x, patch.y)
    glass = patch.inside(lens)
    gleam = smooth(
      0.07,
      0,
      abs(
        abs(patch.x) - self._person.eye_x + 0.8 * (patch.y - self._person.eye_y) + 0.06
      ),
    )
    patch.paint((1.0, 1.0, 1.0), (0.04 + 0.14 * gleam) * glass)
    patch.paint((0.12, 0.11, 0.12), 0.92 * patch.inside(frame))

  def _develop(self, canvas: np.ndarray, grain: int) -> np.ndarray:
    """Adds colour cast and sensor noise, and rounds to integers."""
    size = self._size
    dy, dx = divmod(grain * 7919 % size**2, size)
    canvas *= tint(self._person.cast)
    canvas += np.float32(_GRAIN) * self._layers.grain[:, dy : dy + size, dx : dx + size]
    return np.ascontiguousarray(
      (unit(canvas) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    )


def _half_way(light) -> tuple[float, float, float]:
  """Gives the direction between the light and the viewer."""
  x, y, z = light[0], light[1], light[2] + 1
  n = (x * x + y * y + z * z) ** 0.5
  return x / n, y / n, z / n


def _to_head(v, pose: Pose) -> tuple[float, float, float]:
  """Turns a direction of the room into the head's frame: R^T v."""
  r = pose.rotation
  x, y, z = (sum(r[i][j] * v[i] for i in range(3)) for j in range(3))
  return x, y, z

"""Head pose: face units <-> image, orthographic, with depth from an analytic height
field.
"""

import dataclasses
import functools
import math

import numpy as np

from data_pipelines.synthetic.identity import Identity

SCALE = 0.335 * 1.06  # image heights per face unit
ORIGIN = (0.5, 0.488)  # of the face frame in the image
PIVOT = (0.0, 0.75, -0.45)  # of head rotations: the top of the neck


@dataclasses.dataclass(frozen=True)
class Pose:
  """Radians and image heights.

  + yaw turns to the viewer's right, + pitch lowers the head, + roll tilts clockwise.
  """

  yaw: float = 0.0
  pitch: float = 0.0
  roll: float = 0.0
  tx: float = 0.0
  ty: float = 0.0

  @functools.cached_property
  def rotation(self) -> tuple[tuple[float, float, float], ...]:
    """Rz(roll) Ry(yaw) Rx(pitch) as rows of Python floats."""
    cy, sy, cp, sp, cr, sr = (
      f(t) for t in (self.yaw, self.pitch, self.roll) for f in (math.cos, math.sin)
    )
    x = (cy, -sy * sp, sy * cp)
    y = (0.0, cp, sp)
    return (
      tuple(cr * a - sr * b for a, b in zip(x, y)),
      tuple(sr * a + cr * b for a, b in zip(x, y)),
      (-sy, -cy * sp, cy * cp),
    )


def depth(person: Identity, x, y):
  """Height of the face towards the viewer, with the nose; floored at -0.5."""
  return skull_height(person, x, y, np.maximum) + nose_depth(
    person, x, y, nose_tip(person)
  )


def skull_height(person: Identity, x, y, largest=max):
  """`depth` without the nose.

  `largest` is `max` for floats, `np.maximum` for arrays.
  """
  wide = 1.22 * person.face_width
  y = y + 0.06
  return largest(0.62 - (0.62 / wide**2) * x * x - (0.62 / 1.25**2) * y * y, -0.5)


def nose_tip(person: Identity) -> float:
  """y of the tip of the nose."""
  return person.eye_y + person.nose_length


def nose_depth(person: Identity, x, y, tip: float):
  """Ridge that grows from the brow to the tip, and the tip itself."""
  along = np.clip((y - person.eye_y + 0.10) / (tip - person.eye_y + 0.10), 0, 1)
  below = np.clip((tip + 0.11 - y) / 0.11, 0, 1)
  ridge = 0.13 * np.exp(-((x / 0.085) ** 2)) * along * below
  bulb = 0.08 * np.exp(-((x / 0.085) ** 2) - ((y - tip) / 0.085) ** 2)
  return person.nose_depth * (ridge + bulb)


def project(person: Identity, pose: Pose, x, y):
  """Points of the face -> image coordinates in [0, 1] where inside the picture."""
  return project_points(pose, x, y, depth(person, x, y))


def project_points(pose: Pose, x, y, z):
  """Points in face units -> image coordinates."""
  px, py, pz = PIVOT
  q = (x - px, y - py, z - pz)

  def row(r):
    return r[0] * q[0] + r[1] * q[1] + r[2] * q[2]

  rx, ry, _ = pose.rotation
  return (
    ORIGIN[0] + pose.tx + SCALE * (row(rx) + px),
    ORIGIN[1] + pose.ty + SCALE * (row(ry) + py),
  )


def plane_map(pose: Pose, z: float):
  """The affine map from image coordinates to points of the plane at depth z of the
  head: (matrix, offset).
  """
  (a, b, c), (d, e, f), _ = pose.rotation
  det = a * e - b * d
  inverse = ((e / det, -b / det), (-d / det, a / det))
  px, py, pz = PIVOT
  shift = (
    (ORIGIN[0] + pose.tx) / SCALE + px + c * (z - pz),
    (ORIGIN[1] + pose.ty) / SCALE + py + f * (z - pz),
  )
  offset = tuple(
    p - m[0] * shift[0] - m[1] * shift[1] for p, m in zip((px, py), inverse)
  )
  return tuple(tuple(v / SCALE for v in m) for m in inverse), offset


def unproject(
  person: Identity, pose: Pose, u: np.ndarray, v: np.ndarray, iterations: int = 3
) -> tuple[np.ndarray, np.ndarray]:
  """Image coordinates (u [w], v [h]) -> points of the face (x, y), [h, w] each.

  Fixed point of p <- A^-1 (P - c - R[:2, 2] z(p)); converges for |yaw|, |pitch| below
  about 0.4.
  """
  matrix, offset = plane_map(pose, 0.0)
  (a, b), (c, d) = matrix
  x0 = a * u[None, :] + b * v[:, None] + offset[0]
  y0 = c * u[None, :] + d * v[:, None] + offset[1]
  (_, _, rx), (_, _, ry), _ = pose.rotation
  # Moving by depth z shifts the solution against A^-1 R[:2, 2].
  kx, ky = SCALE * (a * rx + b * ry), SCALE * (c * rx + d * ry)
  if abs(kx) + abs(ky) < 1e-6:
    return x0, y0
  tip = nose_tip(person)
  near = (abs(x0) < 0.48) & (
    abs(y0 - tip + 0.2) < 0.65
  )  # where the nose can come to lie
  rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
  nose = (
    (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    if rows.size
    else (slice(0), slice(0))
  )
  x, y = x0, y0
  for _ in range(iterations):
    z = skull_height(person, x, y, np.maximum)
    z[nose] += nose_depth(person, x[nose], y[nose], tip)
    x, y = x0 - kx * z, y0 - ky * z
  return x, y

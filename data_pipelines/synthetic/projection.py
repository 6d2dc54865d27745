"""Maps face units to the image and back, by the pose of the head.

The projection is orthographic; depth comes from an analytic height field.
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
  """Pose of the head, in radians and image heights.

  Positive yaw turns to the viewer's right, positive pitch lowers the head, and positive
  roll tilts clockwise.
  """

  yaw: float = 0.0
  pitch: float = 0.0
  roll: float = 0.0
  tx: float = 0.0
  ty: float = 0.0

  @functools.cached_property
  def rotation(self) -> tuple[tuple[float, float, float], ...]:
    """Rz(roll) Ry(yaw) Rx(pitch) as rows of Python floats."""
    cy, sy = math.cos(self.yaw), math.sin(self.yaw)
    cp, sp = math.cos(self.pitch), math.sin(self.pitch)
    cr, sr = math.cos(self.roll), math.sin(self.roll)
    x0, x1, x2 = (cy, -sy * sp, sy * cp)
    y0, y1, y2 = (0.0, cp, sp)
    return (
      (cr * x0 - sr * y0, cr * x1 - sr * y1, cr * x2 - sr * y2),
      (sr * x0 + cr * y0, sr * x1 + cr * y1, sr * x2 + cr * y2),
      (-sy, -cy * sp, cy * cp),
    )


def depth(person: Identity, x, y):
  """Gives the height of the face towards the viewer, with the nose; at least -0.5."""
  return skull_height(person, x, y, np.maximum) + nose_depth(
    person, x, y, nose_tip(person)
  )


def skull_height(person: Identity, x, y, largest=max):
  """Gives `depth` without the nose; `largest` is `np.maximum` for arrays."""
  wide = 1.22 * person.face_width
  y = y + 0.06
  return largest(0.62 - (0.62 / wide**2) * x * x - (0.62 / 1.25**2) * y * y, -0.5)


def nose_tip(person: Identity) -> float:
  """Gives y of the tip of the nose."""
  return person.eye_y + person.nose_length


def nose_depth(person: Identity, x, y, tip: float):
  """Gives the height of the nose: a ridge that grows from brow to tip, and the tip."""
  along = np.clip((y - person.eye_y + 0.10) / (tip - person.eye_y + 0.10), 0, 1)
  below = np.clip((tip + 0.11 - y) / 0.11, 0, 1)
  ridge = 0.13 * np.exp(-((x / 0.085) ** 2)) * along * below
  bulb = 0.08 * np.exp(-((x / 0.085) ** 2) - ((y - tip) / 0.085) ** 2)
  return person.nose_depth * (ridge + bulb)


def project(person: Identity, pose: Pose, x, y):
  """Maps points of the face to image coordinates, in [0, 1] inside the image."""
  return project_points(pose, x, y, depth(person, x, y))


def project_points(pose: Pose, x, y, z):
  """Maps points in face units to image coordinates."""
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
  """Gives the affine map from the image to the plane at depth z of the head.

  Returns:
    (matrix, offset).
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
  """Maps image coordinates (u [w], v [h]) to points of the face (x, y), [h, w] each.

  This is the fixed point of p <- A^-1 (P - c - R[:2, 2] z(p)), which converges for
  |yaw| and |pitch| below about 0.4.
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
  # The nose can only lie in these rows and columns.
  near = (abs(x0) < 0.48) & (abs(y0 - tip + 0.2) < 0.65)
  rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
  nose = (slice(0), slice(0))
  if rows.size:
    nose = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
  x, y = x0, y0
  for _ in range(iterations):
    z = skull_height(person, x, y, np.maximum)
    z[nose] += nose_depth(person, x[nose], y[nose], tip)
    x, y = x0 - kx * z, y0 - ky * z
  return x, y

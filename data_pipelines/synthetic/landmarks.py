"""Computes the 68 landmarks and the face box of a frame.

They come from the same curves that the renderer paints.
"""

import numpy as np

from data_pipelines.synthetic import geometry, projection
from data_pipelines.synthetic.geometry import Face
from data_pipelines.synthetic.projection import Pose

FOREHEAD_Y = -0.85  # top of the face box: the hairline, not the crown
_BOX_STEPS = np.linspace(0, 1, 48)
# Dense towards the chin, where the outline turns.
_JAW_STEPS = np.sin(np.linspace(0, np.pi / 2, 60))
_BROW_STEPS = np.linspace(0, 1, 5)
_LID_STEPS = np.array([-1.0, -0.38, 0.38, 1.0])
_OUTER_STEPS = np.linspace(-1, 1, 7)
_INNER_STEPS = np.linspace(-1, 1, 5)


def landmarks(face: Face, pose: Pose) -> np.ndarray:
  """Computes 68 points in the usual order: float32 [68, 2], in [0, 1] of the image.

  17 lie on the outline, from the viewer's left to right at equal arc; 5 on each brow; 9
  on the nose; 6 around each eye; 12 on the outer and 8 on the inner edge of the lips.
  """
  points = [
    _jaw(face),
    *map(_brow, face.brows),
    _nose(face),
    *map(_eye, face.eyes),
    _mouth(face),
  ]
  return _project(face, pose, np.concatenate(points))


def face_box(face: Face, pose: Pose) -> np.ndarray:
  """Computes x1, y1, x2, y2 of the face: float32 [4], in [0, 1] of the image.

  The face reaches from hairline to chin, without hair and ears.
  """
  y = FOREHEAD_Y + (face.person.chin - FOREHEAD_Y) * _BOX_STEPS
  x = geometry.outline(face.person, y)
  points = _project(
    face,
    pose,
    np.stack([np.concatenate([x, -x]), face.stretch(np.concatenate([y, y]))], -1),
  )
  return np.concatenate([points.min(0), points.max(0)])


def _project(face: Face, pose: Pose, points: np.ndarray) -> np.ndarray:
  return np.stack(
    projection.project(face.person, pose, points[:, 0], points[:, 1]), -1
  ).astype(np.float32)


def _jaw(face: Face) -> np.ndarray:
  p = face.person
  y = p.eye_y + (p.chin - p.eye_y) * _JAW_STEPS
  x, y = geometry.outline(p, y), face.stretch(y)
  curve = np.concatenate([np.stack([-x, y], -1), np.stack([x, y], -1)[-2::-1]])
  arc = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(curve, axis=0).T))])
  at = np.linspace(0, arc[-1], 17)
  return np.stack([np.interp(at, arc, c) for c in curve.T], -1)


def _brow(brow: geometry.Brow) -> np.ndarray:
  t = _BROW_STEPS
  x = brow.side * (brow.inner[0] + t * (brow.outer[0] - brow.inner[0]))
  points = np.stack([x, brow.curve(t)], -1)
  return points[::-1] if brow.side < 0 else points


def _nose(face: Face) -> np.ndarray:
  p = face.person
  tip = projection.nose_tip(p)
  lift = 0.025 * face.sneer
  bridge = np.stack([np.zeros(4), np.linspace(p.eye_y, tip - lift, 4)], -1)
  x = p.nose_width * np.linspace(-0.9, 0.9, 5)
  base = tip - lift + 0.085 - 0.03 * np.abs(np.linspace(-1, 1, 5))
  return np.concatenate([bridge, np.stack([x, base], -1)])


def _eye(eye: geometry.Eye) -> np.ndarray:
  u = _LID_STEPS
  upper, lower = eye.lids(u)
  x = eye.side * (eye.x + u * eye.width)
  y = eye.y - eye.tilt * u * eye.width
  top, bottom = np.stack([x, y + upper], -1), np.stack([x, y + lower], -1)
  # From the viewer's left corner over the upper lid and back along the lower one.
  if eye.side < 0:
    return np.concatenate([top[::-1], bottom[1:3]])
  return np.concatenate([top, bottom[2:0:-1]])


def _mouth(face: Face) -> np.ndarray:
  m = face.mouth

  def edges(u):
    corner = np.where(u > 0, m.corner[1], m.corner[0])
    x = u * np.where(u > 0, m.width[1], m.width[0])
    return x, m.y + np.stack(m.inner(u, corner)), np.stack(m.thickness(u))

  x, lip, thick = edges(_OUTER_STEPS)
  top = np.stack([x, lip[0] - thick[0]], -1)
  bottom = np.stack([x, lip[1] + thick[1]], -1)
  x, lip, _ = edges(_INNER_STEPS)
  upper = np.stack([x, lip[0]], -1)
  lower = np.stack([x, lip[1]], -1)
  return np.concatenate([top, bottom[-2:0:-1], upper, lower[-2:0:-1]])

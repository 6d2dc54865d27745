"""The painter and its geometry: truth on the image, graded emotions, float32
throughout.
"""

import numpy as np
import pytest

from data_pipelines.synthetic import emotions, geometry, painting, projection
from data_pipelines.synthetic.clip import make_portrait
from data_pipelines.synthetic.geometry import make_face
from data_pipelines.synthetic.identity import make_identity
from data_pipelines.synthetic.landmarks import face_box, landmarks
from data_pipelines.synthetic.projection import Pose
from data_pipelines.synthetic.renderer import Renderer
from dicetalk_jax.data.clip_record import EMOTIONS

_REST = np.zeros(6)
_MOODS = tuple(e for e in EMOTIONS if e != 'neutral')


def paint(identity, emotion, level=3, size=64, pose=None):
  face = make_face(make_identity(identity), emotions.preset(emotion, level), _REST)
  return Renderer(make_identity(identity), size)(face, pose or Pose()).astype(float)


def mask_of(box, size):
  x1, y1, x2, y2 = (box * size).round().astype(int)
  mask = np.zeros((size, size), bool)
  mask[y1:y2, x1:x2] = True
  return mask


def test_opening_is_monotone_in_the_jaw_and_visible_in_the_image():
  person, au = make_identity(11), emotions.preset('neutral')
  faces = []
  for jaw in np.linspace(0, 1.25, 11):
    au[emotions.AU['26']] = jaw
    faces.append(make_face(person, au, _REST))
  openings = np.array([f.mouth.opening for f in faces])
  assert openings[0] == 0 and (np.diff(openings) > 0).all() and openings[-1] > 0.3
  assert (np.diff([f.drop for f in faces]) > 0).all()
  draw = Renderer(person, 64)
  closed, *rest = (draw(f, Pose()).astype(float) for f in faces[::3])
  change = [np.abs(p - closed).mean() for p in rest]
  assert (np.diff(change) > 0).all()


def test_lips_never_cross():
  rng = np.random.default_rng(0)
  u = np.linspace(-1, 1, 41)
  for seed in range(60):
    face = make_face(
      make_identity(seed), rng.uniform(0, 1, 26), rng.uniform(0, 1, 6), rng.uniform()
    )
    m = face.mouth
    top, bottom = m.inner(u, np.where(u > 0, m.corner[1], m.corner[0]))
    assert (bottom - top >= -1e-9).all()
    assert bottom[20] - top[20] == pytest.approx(m.opening)
    for eye in face.eyes:
      assert eye.up + eye.down > -0.01


def test_projection_and_its_inverse_agree():
  person, pose = make_identity(3), Pose(0.15, -0.12, 0.06, 0.01, -0.01)
  grid = np.meshgrid(np.linspace(-0.5, 0.5, 9), np.linspace(-0.6, 0.8, 9))
  for px, py in zip(*(t.ravel() for t in grid)):
    u, v = projection.project(person, pose, px, py)
    bx, by = projection.unproject(
      person, pose, np.float32([u]), np.float32([v]), iterations=8
    )
    assert abs(bx[0, 0] - px) < 1e-4 and abs(by[0, 0] - py) < 1e-4
  rotation = np.array(pose.rotation)
  np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)


def test_head_turns_the_way_its_pose_says():
  person = make_identity(3)

  def nose(pose):
    return np.array(projection.project(person, pose, 0.0, projection.nose_tip(person)))

  rest = nose(Pose())
  assert nose(Pose(yaw=0.1))[0] > rest[0] + 0.01
  assert nose(Pose(pitch=0.1))[1] > rest[1] + 0.01
  assert nose(Pose(tx=0.02))[0] == pytest.approx(rest[0] + 0.02)
  face = make_face(person, emotions.preset('neutral'), _REST)
  eyes = landmarks(face, Pose(roll=0.1))[[36, 45]]
  assert eyes[1, 1] > eyes[0, 1] + 0.01  # clockwise: the viewer's right eye sinks


@pytest.mark.parametrize('emotion', EMOTIONS)
def test_landmarks_lie_inside_the_box(emotion):
  for identity in range(6):
    face, pose = (
      make_face(make_identity(identity), emotions.preset(emotion), _REST),
      Pose(0.1, 0.05, -0.06),
    )
    points, box = landmarks(face, pose), face_box(face, pose)
    assert points.shape == (68, 2) and points.dtype == box.dtype == np.float32
    assert (points >= box[:2] - 1e-3).all() and (points <= box[2:] + 1e-3).all()
    assert (box >= 0).all() and (box <= 1).all()


def test_landmarks_follow_the_image():
  """Dark pupils at the eyes' centres, red lips between the outer and inner lip
  points.
  """
  image, _ = make_portrait(10, size=256)
  face = make_face(make_identity(10), emotions.preset('neutral'), _REST)
  points = landmarks(face, Pose()) * 256
  for eye in (points[36:42], points[42:48]):
    x, y = eye.mean(0)
    centre = image[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3]
    assert centre.min() < 40
  x, y = points[57]
  lip, chin = (
    image[int(y) - 4, int(x)].astype(int),
    image[int(y) + 16, int(x)].astype(int),
  )
  assert lip[0] - lip[1] > chin[0] - chin[1] + 15


@pytest.mark.parametrize('emotion', _MOODS)
def test_emotion_changes_the_face_gradually_and_little_else(emotion):
  graded = []
  for identity in (1, 3, 10):
    neutral = paint(identity, 'neutral')
    inside = mask_of(make_portrait(identity, 64, emotion)[1], 64)
    changes = [
      np.abs(paint(identity, emotion, level) - neutral).mean(-1) for level in (1, 2, 3)
    ]
    graded.append([c[inside].mean() for c in changes])
    assert changes[2][inside].sum() > 10 * changes[2][~inside].sum()
  assert (np.diff(np.mean(graded, 0)) > 0).all()


def test_identities_differ_more_than_emotions_do():
  same = np.abs(paint(3, 'happy') - paint(3, 'neutral')).mean()
  other = np.abs(paint(3, 'neutral') - paint(10, 'neutral')).mean()
  assert other > 3 * same


def test_head_motion_moves_the_head_only():
  still, turned = (
    paint(10, 'neutral'),
    paint(10, 'neutral', pose=Pose(0.12, 0.05, 0.04, 0.01, 0.01)),
  )
  change = np.abs(still - turned).mean(-1)
  assert change[12:50, 12:52].mean() > 8
  assert (
    change[:, :4].mean() < 2 and change[:, -4:].mean() < 2
  )  # backdrop: sensor noise alone


def test_blink_covers_the_eyes():
  person = make_identity(10)
  au, draw = emotions.preset('neutral'), Renderer(person, 128)
  x, y = (landmarks(make_face(person, au, _REST), Pose())[36:42].mean(0) * 128).astype(
    int
  )

  def darkest(blink):
    return (
      draw(make_face(person, au, _REST, blink), Pose())[y - 3 : y, x - 1 : x + 2]
      .mean(-1)
      .min()
    )

  assert darkest(0.0) < 30 and darkest(1.0) > 90  # the pupil, and the lid over it


def test_sizes_show_the_same_face():
  small, large = paint(5, 'happy', size=64), paint(5, 'happy', size=256)
  shrunk = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
  assert np.abs(small - shrunk).mean() < 4


def test_outline_is_where_its_field_vanishes():
  person = make_identity(2)
  y = np.linspace(-1.1, 0.9, 9)
  np.testing.assert_allclose(
    geometry.outline_field(person, geometry.outline(person, y), y), 0, atol=1e-6
  )
  face = make_face(person, np.full(26, 0.5), _REST)
  np.testing.assert_allclose(face.unstretch(face.stretch(y)), y, atol=1e-12)


@pytest.mark.parametrize('identity', (0, 3, 8, 10))
def test_painting_stays_in_float32(identity, monkeypatch):
  """One numpy scalar among the parameters would promote whole images and halve the
  speed.
  """
  seen = []

  def watched(method):
    def call(*arguments):
      seen.extend(a.dtype for a in arguments if isinstance(a, np.ndarray))
      return method(*arguments)

    return call

  for owner, name in (
    (painting.Patch, 'paint'),
    (painting.Patch, 'shade'),
    (painting.Texture, 'sample'),
  ):
    monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
  rng, person = np.random.default_rng(identity), make_identity(identity)
  for emotion in EMOTIONS:
    face = make_face(
      person,
      emotions.preset(emotion) + np.float32(0.1),
      rng.uniform(0, 1, 6),
      np.float32(0.3),
    )
    Renderer(person, 32)(face, Pose(0.1, 0.05, 0.02))
  assert set(seen) == {np.dtype(np.float32)} and len(seen) > 100


def test_identity_holds_plain_numbers_only():
  for seed in range(20):
    person = make_identity(seed)
    numbers = [v for v in vars(person).values() if not isinstance(v, str)]
    flat = [x for v in numbers for x in (v if isinstance(v, tuple) else (v,))]
    assert all(type(x) in (int, float, bool, tuple) or hasattr(x, 'f0') for x in flat)
    assert type(person.voice.f0) is float and person == make_identity(
      seed
    ) != make_identity(seed + 1)

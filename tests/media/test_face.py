"""Detectors of faces, and boxes that the user gives."""

import builtins

import numpy as np
import pytest
from skimage import data

from data_pipelines.synthetic.clip import make_clip
from dicetalk_jax.errors import InputError
from dicetalk_jax.media import face

# Corners: cheek to cheek and hairline to chin, read off the image.
ASTRONAUT = (180, 68, 268, 168)


def _overlap(box, corners):
  """Intersection over union of (left, top, width, height) and (x0, y0, x1, y1)."""
  x0, y0, x1, y1 = corners
  left, top, width, height = box
  across = min(left + width, x1) - max(left, x0)
  down = min(top + height, y1) - max(top, y0)
  shared = max(0, across) * max(0, down)
  return shared / (width * height + (x1 - x0) * (y1 - y0) - shared)


def _without(monkeypatch, *packages):
  real = builtins.__import__

  def fake(name, *args, **kwargs):
    if name.split('.')[0] in packages:
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, '__import__', fake)


def test_a_photograph():
  assert _overlap(face.find_face(data.astronaut()), ASTRONAUT) > 0.8


def test_without_opencv_the_other_detector_serves(monkeypatch):
  image = data.astronaut()
  _without(monkeypatch, 'cv2')
  assert _overlap(face.find_face(image), ASTRONAUT) > 0.8


def test_the_box_scales_with_the_image():
  image = data.astronaut()
  small = np.array(face.find_face(image[::2, ::2]))
  np.testing.assert_allclose(2 * small, face.find_face(image), atol=12)


@pytest.mark.parametrize('identity', [0, 1, 2])
def test_rendered_faces_have_the_box_of_their_outline(identity):
  clip = make_clip(identity, 'neutral', 1, 0, size=128, max_seconds=0.04)
  assert _overlap(face.find_face(clip.frames[0]), clip.bbox[0] * 128) > 0.75


def test_no_face_names_the_remedy(monkeypatch):
  blank = np.full((200, 300, 3), 90, np.uint8)
  with pytest.raises(InputError, match='--face_box'):
    face.find_face(blank)
  _without(monkeypatch, 'cv2', 'skimage')
  with pytest.raises(InputError, match='--face_box'):
    face.find_face(blank)


def test_own_boxes():
  assert face.parse_face_box('10, 20,110.5,220', (200, 300)) == (10, 20, 100.5, 200)


@pytest.mark.parametrize(
  'text',
  [
    '',
    '1,2,3',
    '1,2,3,x',
    '50,20,40,60',
    '0,0,201,50',
    '-1,0,20,20',
    'nan,0,20,20',
    '0,0,inf,20',
  ],
)
def test_boxes_that_are_refused(text):
  with pytest.raises(InputError, match='--face_box'):
    face.parse_face_box(text, (200, 300))

"""Boxes that the user gives."""

import pytest

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import face


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

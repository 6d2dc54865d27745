"""Contact sheets, videos side by side, image files."""

import os

import numpy as np
from PIL import Image
import pytest

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import contact_sheet

RED = np.full((40, 40, 3), (200, 0, 0), np.uint8)
GREEN = np.full((40, 40, 3), (0, 200, 0), np.uint8)


def _has_colour(pixels, colour):
  return np.abs(pixels.astype(int) - colour).max(-1) < 8


def test_every_frame_has_its_cell(tmp_path):
  rows = [('happy', [RED, GREEN]), ('surprised', [GREEN, None])]
  table = contact_sheet.contact_sheet(
    rows, ('truth', 'generated'), scale=2, path=tmp_path / 'new' / 'sheet.png'
  )
  red_rows, red_columns = np.nonzero(_has_colour(table, (200, 0, 0)))
  green_rows, green_columns = np.nonzero(_has_colour(table, (0, 200, 0)))
  assert len(red_rows) == 80 * 80
  assert len(green_rows) == 2 * 80 * 80
  assert red_columns.max() < green_columns.max()
  assert green_rows.min() == red_rows.min()
  saved = np.asarray(Image.open(tmp_path / 'new' / 'sheet.png'))
  np.testing.assert_array_equal(saved, table)
  assert os.listdir(tmp_path / 'new') == ['sheet.png']


def test_labels_and_headings_are_drawn_in_the_margins():
  plain = contact_sheet.contact_sheet([('', [RED])])
  headed = contact_sheet.contact_sheet([('angry', [RED])], ('0.0 s',))
  assert (plain < 100).all(-1).sum() == 0
  assert (headed[:8, 40:] < 100).all(-1).sum() > 5  # heading
  assert (headed[20:, :30] < 100).all(-1).sum() > 20  # label
  assert headed.shape[0] > plain.shape[0]
  assert headed.shape[1] > plain.shape[1]


def test_videos_side_by_side_repeat_their_last_frame():
  red = np.stack([RED] * 3)
  green = np.stack([GREEN, RED])
  frames = contact_sheet.side_by_side([red, green], ['truth', 'model'])
  assert frames.dtype == np.uint8
  assert len(frames) == 3
  assert frames.shape[2] == 80
  np.testing.assert_array_equal(frames[:, -40:, :40], red)
  np.testing.assert_array_equal(frames[:, -40:, 40:], np.stack([GREEN, RED, RED]))


def test_other_image_formats_are_refused(tmp_path):
  with pytest.raises(InputError, match='.png or .jpg'):
    contact_sheet.save_image(tmp_path / 'a.gif', RED)

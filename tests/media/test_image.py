"""Images, face masks and crops equal those of the reference implementation."""

import json

import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import load_file

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import image

SQUARES = 30


def _pattern(width, height):
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  return np.stack(
    [(3 * x + 5 * y + 40 * c + x * y // 97) % 256 for c in range(3)], -1
  ).astype(np.uint8)


@pytest.mark.parametrize('case', [5, 6, 7])
def test_preprocessing_equals_the_reference_implementation(goldens, case):
  folder = goldens / 'preprocess'
  cases = json.loads((folder / 'image_cases.json').read_text())['cases']
  spec = next(spec for spec in cases if spec['case'] == f'case{case}')
  golden = load_file(folder / 'image_cases.safetensors')
  want = {
    name.removeprefix(f'case{case}/'): values
    for name, values in golden.items()
    if name.startswith(f'case{case}/')
  }
  portrait = image.prepare_portrait(
    _pattern(spec['width'], spec['height']),
    spec['bbox_xywh'],
    image_size=spec['image_size'],
    area=spec['area'],
  )
  mask = portrait.mask
  ref_img = np.moveaxis(portrait.ref_img, -1, 0)
  clip_image = np.moveaxis(portrait.clip_image, -1, 0)
  size = spec['new_height'], spec['new_width']
  assert mask.shape == ref_img.shape[1:] == size
  assert mask.dtype == ref_img.dtype == clip_image.dtype == np.float32
  np.testing.assert_array_equal(mask[3::8, 3::8], want['face_mask_sample'])
  columns, rows = mask.sum(0, dtype=np.float64), mask.sum(1, dtype=np.float64)
  np.testing.assert_allclose(columns, want['face_mask_colsum'], rtol=1e-6)
  np.testing.assert_allclose(rows, want['face_mask_rowsum'], rtol=1e-6)
  np.testing.assert_array_equal(ref_img[:, 5::16, 5::16], want['ref_img_sample'])
  np.testing.assert_allclose(ref_img.mean(2), want['ref_img_rowmean'], atol=1e-6)
  np.testing.assert_array_equal(clip_image[:, ::16, ::16], want['clip_image_sample'])


def test_an_image_of_the_right_size_stays_untouched():
  pixels = _pattern(512, 512)
  portrait = image.prepare_portrait(pixels, (150, 140, 200, 230))
  np.testing.assert_allclose((portrait.ref_img + 1) * 127.5, pixels, atol=1e-4)
  assert np.unique(portrait.mask).tolist() == [0, 1]
  assert portrait.mask.sum() == 55440


def test_square_crops_equal_the_reference_implementation(goldens):
  cases = json.loads((goldens / 'preprocess' / 'process_bbox.json').read_text())[
    'cases'
  ]
  assert len(cases) == SQUARES
  for case in cases:
    got = image.crop_square(
      case['bbox'], case['width'], case['height'], case['expand_radio']
    )
    assert list(got) == case['result'], case


@pytest.mark.parametrize(
  ('size', 'want'),
  [((544, 480), (576, 512)), ((720, 1280), (512, 896)), ((96, 64), (768, 512))],
)
def test_sizes_round_halves_to_even(size, want):
  assert image.target_size(*size) == want


@pytest.mark.parametrize('size', [16, 0, -512])
def test_too_small_a_size_is_refused(size):
  with pytest.raises(InputError, match='multiple of 64'):
    image.target_size(512, 512, size)


def test_the_crop_moves_the_face_box_along():
  pixels = _pattern(400, 300)
  square, (left, top, width, height) = image.crop_around_face(pixels, (200, 90, 60, 80))
  x0, y0, x1, y1 = image.crop_square((200, 90, 260, 170), 400, 300)
  np.testing.assert_array_equal(square, pixels[y0:y1, x0:x1])
  face = pixels[90:170, 200:260]
  in_square = square[top : top + height, left : left + width]
  np.testing.assert_array_equal(in_square, face)


def test_too_small_a_crop_is_refused():
  with pytest.raises(InputError, match='only 40x40 pixels.*leave out --crop'):
    image.crop_around_face(_pattern(400, 300), (200, 90, 20, 20))


def test_a_box_outside_is_refused():
  for box in [(400, 10, 50, 50), (-80, 10, 50, 50), (10, 10, 0, 0)]:
    with pytest.raises(InputError, match='--face_box'):
      image.prepare_portrait(_pattern(256, 256), box)


def test_images_load_upright_as_rgb(tmp_path):
  pixels = _pattern(80, 100)
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned clockwise by 90 degrees
  Image.fromarray(np.rot90(pixels)).save(tmp_path / 'turned.png', exif=exif)
  np.testing.assert_array_equal(image.load_image(tmp_path / 'turned.png'), pixels)
  Image.fromarray(pixels).convert('L').save(tmp_path / 'grey.png')
  assert image.load_image(tmp_path / 'grey.png').shape == (100, 80, 3)


def test_bad_images_are_refused(tmp_path):
  Image.fromarray(_pattern(200, 200)).save(tmp_path / 'whole.png')
  whole = (tmp_path / 'whole.png').read_bytes()
  (tmp_path / 'half.png').write_bytes(whole[: len(whole) // 2])
  (tmp_path / 'text.jpg').write_text('not an image')
  Image.fromarray(_pattern(200, 30)).save(tmp_path / 'tiny.png')
  for name, words in [
    ('missing.png', 'does not exist'),
    ('half.png', 'cannot be read'),
    ('text.jpg', 'cannot be read'),
    ('tiny.png', 'at least 64'),
  ]:
    with pytest.raises(InputError, match=words) as caught:
      image.load_image(tmp_path / name)
    assert name in str(caught.value)

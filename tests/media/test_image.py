"""Images, face masks and crops equal those of the reference implementation."""

import json
import os
import pathlib
import struct
import tracemalloc
import warnings
import zlib

import cv2
import numpy as np
from PIL import EpsImagePlugin, Image
import pytest
from safetensors.numpy import load_file

from dicetalk_jax.errors import InputError
from dicetalk_jax.media import image

FIELD_INPUTS = pathlib.Path(__file__).parents[1] / 'field_inputs'
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


@pytest.mark.parametrize('name', ['grey16.png', 'float.tif'])
def test_grey_of_16_bits_and_floats_keeps_its_shades(name):
  """These files hold a portrait that 8 bits would show from black to white."""
  values = np.asarray(Image.open(FIELD_INPUTS / name), np.float64)
  white = 65535 if name == 'grey16.png' else 1.0
  pixels = image.load_image(FIELD_INPUTS / name)
  assert pixels.dtype == np.uint8 and pixels.shape == (*values.shape, 3)
  for channel in range(3):
    np.testing.assert_allclose(pixels[..., channel], values * 255 / white, atol=0.5001)


@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('dtype', ['uint16', '>u2', 'int32'])
def test_white_is_that_of_the_bit_depth_that_values_need(tmp_path, bits, dtype):
  ramp = np.linspace(0, 2**bits - 1, 80 * 80).reshape(80, 80).round()
  Image.fromarray(ramp.astype(dtype)).save(tmp_path / 'x.tif')
  pixels = image.load_image(tmp_path / 'x.tif')
  np.testing.assert_allclose(pixels[..., 0], ramp * 255 / (2**bits - 1), atol=0.5001)


@pytest.mark.parametrize('scale, shift', [(1000, 0), (2, -1), (1e-3, 5), (255, 0)])
def test_floats_of_any_range_are_stretched(tmp_path, scale, shift):
  """With holes, and with highlights that would leave all the rest black."""
  ramp = np.linspace(0, 1, 128 * 128, dtype=np.float32).reshape(128, 128)
  values = ramp * scale + shift
  values[64, 10:13] = np.nan, np.inf, -np.inf
  values[64, 20:24] = 1e6
  Image.fromarray(values).save(tmp_path / 'x.tif')
  pixels = image.load_image(tmp_path / 'x.tif')[..., 0]
  assert pixels[64, 10:13].tolist() == [0, 255, 0]
  assert pixels[64, 20:24].tolist() == [255] * 4
  usual = np.isfinite(values) & (values < 1e6)
  np.testing.assert_allclose(pixels[usual], 255 * ramp[usual], atol=1)


def test_an_even_float_image_is_read(tmp_path):
  for value in (0, 0.5, 7):
    Image.fromarray(np.full((70, 70), value, np.float32)).save(tmp_path / 'x.tif')
    assert image.load_image(tmp_path / 'x.tif').shape == (70, 70, 3)
  Image.fromarray(np.full((70, 70), np.nan, np.float32)).save(tmp_path / 'x.tif')
  with pytest.raises(InputError, match='cannot be read'):
    image.load_image(tmp_path / 'x.tif')


MODES = ['1', 'L', 'LA', 'RGB', 'RGBA', 'CMYK', 'P', 'PA', 'YCbCr']


@pytest.mark.parametrize('mode', MODES)
def test_images_of_every_mode_show_the_same(tmp_path, mode):
  """And nothing is printed about it."""
  blocks = np.array([[0, 255], [255, 0]], np.uint8).repeat(40, 0).repeat(40, 1)
  pixels = np.stack([blocks, blocks, blocks], axis=-1)
  picture = Image.fromarray(pixels)
  options = {}
  if mode in ('P', 'PA'):
    picture = picture.quantize(2)
    if mode == 'PA':
      options = dict(transparency=bytes([0, 128]))
  else:
    picture = picture.convert(mode)
  if mode in ('LA', 'RGBA'):
    picture.putalpha(Image.fromarray(np.tile(np.arange(80, dtype=np.uint8), (80, 1))))
  ending = 'tif' if mode in ('CMYK', 'YCbCr') else 'png'
  picture.save(tmp_path / f'x.{ending}', **options)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    np.testing.assert_array_equal(image.load_image(tmp_path / f'x.{ending}'), pixels)


@pytest.mark.parametrize('ending', ['png', 'tif'])
@pytest.mark.parametrize('channels', [3, 4])
def test_colour_of_16_bits(tmp_path, ending, channels):
  pixels = _pattern(80, 70)
  wide = pixels[..., ::-1].astype(np.uint16) * 257
  if channels == 4:
    wide = np.dstack([wide, np.full((70, 80), 30000, np.uint16)])
  assert cv2.imwrite(str(tmp_path / f'x.{ending}'), wide)
  np.testing.assert_array_equal(image.load_image(tmp_path / f'x.{ending}'), pixels)


def test_an_image_that_unpacks_to_gigabytes_is_refused(tmp_path):
  """Before its pixels are unpacked: PNG, and formats with other ways to begin."""
  side = 30_000
  header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
  chunks = b''
  for name, content in [(b'IHDR', header), (b'IDAT', zlib.compress(bytes(10**6)))]:
    check = struct.pack('>I', zlib.crc32(name + content))
    chunks += struct.pack('>I', len(content)) + name + content + check
  (tmp_path / 'x.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunks)
  # Beyond our limit, yet within Pillow's own.
  Image.new('1', (12_000, 12_000)).save(tmp_path / 'x.tif', compression='group4')
  Image.new('P', (12_000, 12_000)).save(tmp_path / 'x.gif')
  for name in ('x.png', 'x.tif', 'x.gif'):
    assert (tmp_path / name).stat().st_size < 1e6
    tracemalloc.start()
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      with pytest.raises(InputError, match='is too large; scale it down'):
        image.load_image(tmp_path / name)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


def test_text_that_unpacks_to_gigabytes_is_refused(tmp_path):
  Image.fromarray(_pattern(80, 80)).save(tmp_path / 'x.png')
  data = (tmp_path / 'x.png').read_bytes()
  text = b'note\0\0' + zlib.compress(bytes(10**8), 9)
  check = struct.pack('>I', zlib.crc32(b'zTXt' + text))
  chunk = struct.pack('>I', len(text)) + b'zTXt' + text + check
  (tmp_path / 'x.png').write_bytes(data[:33] + chunk + data[33:])
  with pytest.raises(InputError, match='cannot be read'):
    image.load_image(tmp_path / 'x.png')


@pytest.mark.parametrize('name', ['x.eps', 'x.png'])
def test_no_other_program_is_started(tmp_path, monkeypatch, name):
  """Pillow has PostScript drawn by Ghostscript, whatever the name of the file."""
  (tmp_path / 'bin').mkdir()
  (tmp_path / 'bin' / 'gs').write_text(f'#!/bin/sh\necho > {tmp_path}/started\n')
  (tmp_path / 'bin' / 'gs').chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
  monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)
  (tmp_path / name).write_text(
    '%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n'
  )
  with pytest.raises(InputError, match='cannot be read'):
    image.load_image(tmp_path / name)
  assert not (tmp_path / 'started').exists()


@pytest.mark.parametrize(
  'text',
  [
    '<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99">'
    '<image href="file:///etc/passwd" width="99" height="99"/></svg>',
    '#EXTM3U\nhttp://127.0.0.1/x.png\n',
    'ffconcat version 1.0\nfile x.png\n',
  ],
)
def test_files_that_name_others_are_no_images(tmp_path, text):
  (tmp_path / 'face.png').write_text(text)
  with pytest.raises(InputError, match='cannot be read'):
    image.load_image(tmp_path / 'face.png')


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

"""Mask resampling: the recorded grids and values of the reference implementation."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dicetalk_jax.diffusion.face_mask import mask_pyramid, resample_mask, token_grid

resample = jax.jit(resample_mask, static_argnums=1)


def golden_mask(case, tensors):
  if case['mask_stored']:
    return tensors[f'{case["case"]}/mask']
  mask = np.zeros((1, *case['mask_hw']), np.float32)
  top, bottom, left, right = case['box']
  mask[:, top:bottom, left:right] = 1
  return mask


@pytest.mark.parametrize('i', range(9))
def test_golden(goldens, i):
  folder = goldens / 'mask_downsample'
  case = json.loads((folder / 'cases.json').read_text())['cases'][i]
  tensors = load_file(folder / 'tensors.safetensors')
  assert token_grid(case['num_queries'], *case['mask_hw']) == tuple(case['used_grid'])
  actual = resample(golden_mask(case, tensors), case['num_queries'])
  np.testing.assert_allclose(actual, tensors[f'case{i}/out'], rtol=0, atol=2e-6)


def test_grid_is_that_of_the_latents():
  """For multiples of 64 up to 2048 pixels, except one that the reference gets wrong."""
  sizes = range(64, 2049, 64)
  wrong = [
    (h, w, s)
    for h in sizes
    for w in sizes
    for s in (8, 16, 32, 64)
    if token_grid((h // s) * (w // s), h, w) != (h // s, w // s)
  ]
  assert wrong == [(448, 1152, 64)]
  assert token_grid(7 * 18, 448, 1152) == (6, 21)


def test_single_precision_makes_no_difference():
  """Sonic rounds to float32 before the root.

  For a shorter side of 512 that gives the same grid, up to an aspect ratio of 1:8.
  """
  for long in range(512, 4097, 64):
    for height, width in ((512, long), (long, 512)):
      for stride in (8, 16, 32, 64):
        tokens = (height // stride) * (width // stride)
        rows = int(np.sqrt(np.float32(tokens / (width / height))))
        assert (
          (rows, tokens // rows)
          == (height // stride, width // stride)
          == token_grid(tokens, height, width)
        )


def test_pads_and_cuts_to_the_tokens():
  assert token_grid(7, 64, 64) == (3, 2)  # 2 rows do not divide 7, 3 do not either
  row = resample(jnp.ones((2, 64, 64)), 7)
  np.testing.assert_allclose(row, [[1] * 6 + [0]] * 2, atol=1e-6)


def test_pyramid():
  mask = np.zeros((2, 64, 128), np.float32)
  mask[1, :, :64] = 1
  levels = jax.jit(lambda mask: mask_pyramid(mask, (8, 16), 3))(mask)
  assert [m.shape for m in levels] == [(2, 128), (2, 32), (2, 8)]
  for i, level in enumerate(levels):
    np.testing.assert_allclose(level, resample(mask, 128 >> (2 * i)), atol=1e-6)
    assert not level[0].any()
    np.testing.assert_allclose(level[1].reshape(8 >> i, -1)[:, 0], 1, atol=1e-6)

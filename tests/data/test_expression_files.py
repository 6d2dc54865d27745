"""Expression features: every format, other rates and lengths."""

import numpy as np
import pytest
import scipy.io

from dicetalk_jax.data import expression_files
from dicetalk_jax.errors import DataError

ROWS = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


def _save(folder, ending):
  path = folder / f'clip{ending}'
  if ending == '.npy':
    np.save(path, ROWS)
  elif ending == '.npz':
    np.savez(path, other=np.zeros(3), coeff=ROWS)
  elif ending == '.mat':
    scipy.io.savemat(path, {'coeff': ROWS, 'transform_params': np.ones((7, 5))})
  elif ending == '.txt':
    np.savetxt(path, ROWS)
  else:
    np.savetxt(path, ROWS, delimiter=',')
  return path


@pytest.mark.parametrize('ending', ['.npy', '.npz', '.mat', '.txt', '.csv'])
def test_every_format(tmp_path, ending):
  path = _save(tmp_path, ending)
  rows = expression_files.read_expression(path)
  assert rows.dtype == np.float32
  np.testing.assert_allclose(rows, ROWS, rtol=1e-6)
  np.testing.assert_allclose(
    expression_files.read_expression(path, columns=(1, 3)), ROWS[:, 1:3], rtol=1e-6
  )
  with pytest.raises(DataError, match='5 columns; columns 3:9'):
    expression_files.read_expression(path, columns=(3, 9))


@pytest.mark.parametrize('ending', ['.txt', '.csv'])
@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-be', 'utf-8-sig'])
@pytest.mark.parametrize('line_end', ['\r', '\r\n'])
def test_text_of_other_systems(tmp_path, ending, encoding, line_end):
  path = _save(tmp_path, ending)
  text = path.read_text().replace('\n', line_end)
  path.write_bytes(text.encode(encoding))
  rows = expression_files.read_expression(path)
  np.testing.assert_allclose(rows, ROWS, rtol=1e-6)


def test_named_arrays(tmp_path):
  np.savez(tmp_path / 'a.npz', first=ROWS, second=2 * ROWS)
  with pytest.raises(DataError, match='first, second; say which with --expression_key'):
    expression_files.read_expression(tmp_path / 'a.npz')
  np.testing.assert_array_equal(
    expression_files.read_expression(tmp_path / 'a.npz', 'second'), 2 * ROWS
  )
  with pytest.raises(DataError, match='expression_key'):
    expression_files.read_expression(tmp_path / 'a.npz', 'third')
  scipy.io.savemat(tmp_path / 'b.mat', {'anything': ROWS, 'label': 'happy'})
  np.testing.assert_array_equal(
    expression_files.read_expression(tmp_path / 'b.mat'), ROWS
  )


def test_openface_gives_its_action_units(tmp_path):
  names = 'frame, timestamp, confidence, gaze_0_x, AU01_r, AU02_r, AU01_c, AU02_c'
  lines = [f'{i}, {i / 30}, 0.98, 0.1, {i}.5, {2 * i}, 1, 0' for i in range(4)]
  (tmp_path / 'a.csv').write_text(
    '\n'.join(['\ufeff' + names, *lines, '']), encoding='utf-8'
  )
  np.testing.assert_allclose(
    expression_files.read_expression(tmp_path / 'a.csv'),
    [[i + 0.5, 2 * i] for i in range(4)],
  )
  (tmp_path / 'b.csv').write_text('jaw,smile\n1,2\n3,4\n')
  np.testing.assert_allclose(
    expression_files.read_expression(tmp_path / 'b.csv'), [[1, 2], [3, 4]]
  )


def test_other_contents_than_a_matrix_are_refused(tmp_path):
  np.save(tmp_path / 'objects.npy', np.array([{'a': 1}]), allow_pickle=True)
  np.save(tmp_path / 'nan.npy', ROWS * np.nan)
  np.save(tmp_path / 'line.npy', ROWS[0])
  (tmp_path / 'words.txt').write_text('She had your dark suit in greasy wash water')
  (tmp_path / 'broken.mat').write_bytes(b'MATLAB 5.0' + bytes(20))
  (tmp_path / 'empty.csv').write_text('')
  for name in (
    'objects.npy',
    'nan.npy',
    'line.npy',
    'words.txt',
    'broken.mat',
    'empty.csv',
    'a.pkl',
  ):
    with pytest.raises(DataError, match=name):
      expression_files.read_expression(tmp_path / name)


def test_resampling_is_linear_in_time():
  times = np.arange(90) / 30
  rows = np.stack([times, 3 - 2 * times], axis=1).astype(np.float32)
  new = np.arange(75) / 25
  np.testing.assert_allclose(
    expression_files.resample(rows, 30), np.stack([new, 3 - 2 * new], axis=1), atol=1e-6
  )
  assert expression_files.resample(rows, 25) is rows
  assert expression_files.resample(rows, 60).shape == (38, 2)
  slow = expression_files.resample(rows[:10], 12.5)
  assert len(slow) == 20
  np.testing.assert_allclose(slow[-1], rows[9])  # repeated after the last row


def test_lengths_may_differ_by_three_frames():
  np.testing.assert_array_equal(expression_files.fit(ROWS, 5), ROWS[:5])
  np.testing.assert_array_equal(
    expression_files.fit(ROWS, 10), np.concatenate([ROWS, ROWS[[-1] * 3]])
  )
  for frames in (3, 11):
    with pytest.raises(DataError, match=f'7 rows of features for {frames} frames'):
      expression_files.fit(ROWS, frames)

"""Pickles of arrays are read, and nothing that they name is called but arrays."""

import builtins
import io
import os
import pickle

import numpy as np
import pytest

from dicetalk_jax import published_priors, safe_pickle
from dicetalk_jax.errors import WeightsError


class Call:
  """Pickles as a call of a function."""

  def __init__(self, function, *args):
    self.function = function
    self.args = args

  def __reduce__(self):
    return self.function, self.args


@pytest.mark.parametrize('protocol', range(5))
@pytest.mark.parametrize('dtype', ['<f4', '>f8', '<i8', '|b1', '<U3'])
def test_arrays_and_containers(protocol, dtype):
  array = np.arange(6).reshape(2, 3).astype(dtype)
  content = {'a': array, 'b': [1.5, ('text', None)], 'c': np.asfortranarray(array)}
  read = safe_pickle.load(io.BytesIO(pickle.dumps(content, protocol)))
  assert read.keys() == content.keys()
  assert read['b'] == content['b']
  for name in ('a', 'c'):
    np.testing.assert_array_equal(read[name], array)
    assert read[name].dtype == array.dtype.newbyteorder('=')  # as NumPy does


def test_arrays_of_numpy_1():
  content = pickle.dumps(np.arange(3.0), 4)
  new = b'numpy._core.multiarray'
  old = b'numpy.core.multiarray'
  size = len(new).to_bytes(1, 'little')
  assert size + new in content
  content = content.replace(size + new, len(old).to_bytes(1, 'little') + old)
  # The frame of protocol 4 counts its bytes; it is one byte shorter now.
  start = content.index(b'\x95') + 1
  frame = int.from_bytes(content[start : start + 8], 'little') - 1
  content = content[:start] + frame.to_bytes(8, 'little') + content[start + 8 :]
  np.testing.assert_array_equal(safe_pickle.load(io.BytesIO(content)), np.arange(3.0))


@pytest.mark.parametrize('protocol', range(5))
@pytest.mark.parametrize(
  'function, args, name',
  [
    (os.mkdir, ('pwned',), 'mkdir'),
    (builtins.eval, ("__import__('os').mkdir('pwned')",), 'eval'),
    (getattr, ('text', 'upper'), 'getattr'),
    (np.load, ('pwned',), 'load'),
    (np.dtype, ('O',), None),
  ],
)
def test_other_functions_are_not_called(
  tmp_path, monkeypatch, protocol, function, args, name
):
  monkeypatch.chdir(tmp_path)
  pickled = io.BytesIO(pickle.dumps([Call(function, *args)], protocol))
  if name is None:
    assert safe_pickle.load(pickled) == [function(*args)]
  else:
    with pytest.raises(safe_pickle.ForbiddenError, match=name):
      safe_pickle.load(pickled)
  assert not list(tmp_path.iterdir())


def test_persistent_ids_are_refused():
  class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
      return 'storage' if obj == 'secret' else None

  file = io.BytesIO()
  Pickler(file).dump(['secret'])
  file.seek(0)
  with pytest.raises(pickle.UnpicklingError):
    safe_pickle.load(file)


def test_a_prior_that_claims_to_be_huge_is_refused(tmp_path):
  """No file of a megabyte holds that many numbers."""
  huge = np.array({'mu': Call(np.ndarray, (10**9,), '<f4')}, object)
  np.save(tmp_path / 'huge.npy', huge, allow_pickle=True)
  with pytest.raises(WeightsError, match='huge.npy is not an emotion prior'):
    published_priors.read(tmp_path / 'huge.npy')

"""Weights of golden modules that follow from a rule."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
import torch

from convert.verify import golden, seeded_weights
from dicetalk_jax.errors import InputError


@pytest.fixture(params=['unet', 'vae'])
def meta(goldens, request):
  return json.loads((goldens / request.param / 'config.json').read_text())


def test_drawing_neither_changes_nor_uses_the_global_generator(meta):
  torch.manual_seed(5)
  before = torch.get_rng_state()
  weights = seeded_weights.draw(meta, 'weights')
  assert torch.equal(torch.get_rng_state(), before)
  torch.manual_seed(6)
  again = seeded_weights.draw(meta, 'weights')
  assert all(
    x.dtype == np.float32 and np.array_equal(x, again[key])
    for key, x in weights.items()
  )
  adapters = [key for key in weights if '.processor.' in key]
  assert len(adapters) == (128 if 'adapter_tokens' in meta else 0)


def test_projection_sees_one_wrong_number_but_not_the_last_bit(meta):
  weights = seeded_weights.draw(meta, 'weights')
  expected = seeded_weights.projection(weights)
  last_bits = {
    key: np.nextafter(x, np.float32(np.inf) * (-1) ** i)
    for i, (key, x) in enumerate(weights.items())
  }
  assert seeded_weights.projection(last_bits) == pytest.approx(expected, abs=1e-4)
  key = next(key for key in weights if key.endswith('conv_in.bias'))
  weights[key][3] += 0.01
  assert abs(seeded_weights.projection(weights) - expected) > 1e-3


def test_other_weights_than_recorded_are_refused(meta):
  with pytest.raises(
    InputError, match=r'PyTorch 2\.\S+ and diffusers .*\[test\]'
  ) as caught:
    seeded_weights.draw(meta | {'seed': meta['seed'] + 1}, 'weights of x')
  assert str(caught.value).startswith('weights of x come out differently')
  with pytest.raises(InputError, match='cannot be drawn from AutoModel, only from'):
    seeded_weights.draw(
      meta | {'drawn': meta['drawn'] | {'class': 'AutoModel'}}, 'weights of x'
    )


def test_missing_diffusers_is_named(meta, monkeypatch):
  monkeypatch.setitem(sys.modules, 'diffusers', None)
  with pytest.raises(
    InputError, match=r'diffusers, which is missing; pip install .*\[test\]'
  ):
    seeded_weights.draw(meta, 'weights of x')


def test_a_file_comes_before_the_rule(meta, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(meta))
  path = tmp_path / 'weights.safetensors'
  assert golden.weights_of(path).keys() == seeded_weights.draw(meta, 'weights').keys()
  save_file({'only': np.zeros(2, np.float32)}, path)
  assert golden.weights_of(path).keys() == {'only'}

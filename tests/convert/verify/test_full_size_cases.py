"""Tensors that follow from a rule: the rule's own samples, and strictness."""

import json

import jax
import numpy as np
import pytest

from convert import naming
from convert.verify import full_size_cases
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.models import parameters, registry


@pytest.fixture(params=['pose_guider', 'rife'])
def described(goldens, request):
  """A full-size module: its description and its abstract parameters."""
  component = 'flownet' if request.param == 'rife' else request.param
  _, target = parameters.abstract(registry.builder(component, {}))
  path = goldens / 'fullsize_seeded' / f'{request.param}.json'
  return json.loads(path.read_text()), target


def test_samples_of_the_rule(described):
  meta, target = described
  params = full_size_cases.params(meta, target)
  assert {k: x.shape for k, x in params.items()} == {
    k: x.shape for k, x in target.items()
  }
  assert all(
    isinstance(x, jax.Array) and x.dtype == np.float32 for x in params.values()
  )
  published = naming.to_torch(params)
  for key, first in meta['first3_check'].items():
    np.testing.assert_array_equal(published[key].ravel()[:3], np.float32(first))
  given = full_size_cases.inputs(meta)
  for name, rule in meta['inputs'].items():
    assert given[name].shape == tuple(rule['shape']) and given[name].dtype == np.float32
    np.testing.assert_array_equal(given[name].ravel()[:3], np.float32(rule['first3']))


def test_other_tensors_than_the_module_has_are_named(described):
  meta, target = described
  rules = meta['weights_seed_base_amp']
  absent = next(iter(rules))
  rules['extra.weight'] = rules.pop(absent)
  with pytest.raises(WeightsError) as error:
    full_size_cases.params(meta, target)
  assert f'missing: {absent}' in str(error.value) and 'left over: extra.weight' in str(
    error.value
  )

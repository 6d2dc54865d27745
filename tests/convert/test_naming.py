"""The naming rule works both ways for every kind of layer, and is strict."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import naming
from dicetalk_jax.errors import WeightsError
from dicetalk_jax.models import parameters


class Net(nnx.Module):
  """One layer of each kind."""

  def __init__(self, *, rngs):
    self.linear = nnx.Linear(3, 4, rngs=rngs)
    self.convs = nnx.List(
      [
        nnx.Conv(2, 5, (3,), rngs=rngs),
        nnx.Conv(2, 5, (3, 1), rngs=rngs),
        nnx.Conv(2, 5, (3, 1, 1), rngs=rngs),
      ]
    )
    self.norm = nnx.LayerNorm(6, rngs=rngs)
    self.embed = nnx.Embed(7, 8, rngs=rngs)
    self.mix_factor = nnx.Param(jnp.zeros(1))


TORCH = torch.nn.ModuleDict(
  {
    'linear': torch.nn.Linear(3, 4),
    'convs': torch.nn.ModuleList(
      [
        torch.nn.Conv1d(2, 5, 3),
        torch.nn.Conv2d(2, 5, (3, 1)),
        torch.nn.Conv3d(2, 5, (3, 1, 1)),
      ]
    ),
    'norm': torch.nn.LayerNorm(6),
    'embed': torch.nn.Embedding(7, 8),
  }
)
TORCH.register_parameter('mix_factor', torch.nn.Parameter(torch.randn(1)))


@pytest.fixture
def state_dict():
  return {name: value.detach().numpy() for name, value in TORCH.state_dict().items()}


@pytest.fixture(scope='module')
def target():
  return parameters.abstract(lambda rngs: Net(rngs=rngs))[1]


def test_round_trip(state_dict, target):
  params = naming.from_torch(target, state_dict)
  assert params.keys() == target.keys()
  assert {name: x.shape for name, x in params.items()} == {
    name: x.shape for name, x in target.items()
  }
  back = naming.to_torch({name: jnp.asarray(x) for name, x in params.items()})
  assert back.keys() == state_dict.keys()
  for name, value in state_dict.items():
    np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert back[name].flags.c_contiguous, name


def test_layers_compute_the_same(state_dict, target):
  graphdef, _ = parameters.abstract(lambda rngs: Net(rngs=rngs))
  net = parameters.merge(graphdef, naming.from_torch(target, state_dict))
  rng = np.random.default_rng(0)
  with jax.default_matmul_precision('highest'), torch.no_grad():
    x = rng.normal(size=(2, 3)).astype(np.float32)
    np.testing.assert_allclose(
      net.linear(x), TORCH['linear'](torch.tensor(x)), atol=1e-6
    )
    for i, size in enumerate([(9,), (9, 4), (9, 4, 3)]):
      x = rng.normal(size=(2, *size, 2)).astype(np.float32)
      expected = TORCH['convs'][i](torch.tensor(x).movedim(-1, 1)).movedim(1, -1)
      actual = net.convs[i](x)[:, 1:-1]  # without the border, where paddings differ
      np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_dtype_is_kept(state_dict, target):
  half = {name: value.astype(np.float16) for name, value in state_dict.items()}
  assert {x.dtype for x in naming.from_torch(target, half).values()} == {
    np.dtype(np.float16)
  }


def test_all_problems_are_named_at_once(state_dict, target):
  del state_dict['linear.bias'], state_dict['embed.weight']
  state_dict['extra.weight'] = state_dict['more.bias'] = np.zeros(3, np.float32)
  state_dict['convs.0.weight'] = np.zeros((2, 5, 3), np.float32)
  with pytest.raises(WeightsError) as error:
    naming.from_torch(target, state_dict)
  lines = [line.strip() for line in str(error.value).splitlines()]
  assert lines[0].startswith('5 tensors')
  assert set(lines[1:]) == {
    'missing: linear.bias',
    'missing: embed.weight',
    'left over: extra.weight',
    'left over: more.bias',
    'shape (2, 5, 3) instead of (5, 2, 3): convs.0.weight',
  }


def test_constants_of_old_files_are_ignored(state_dict, target):
  for key in naming.IGNORED:
    state_dict[key] = np.arange(4)
  assert naming.from_torch(target, state_dict).keys() == target.keys()


def test_names_without_a_module():
  assert naming.torch_name('kernel') == 'weight'
  assert naming.torch_name('blocks.0.conv.kernel') == 'blocks.0.conv.weight'
  assert naming.torch_name('classifier.prelu_scale') == 'classifier.prelu_scale'

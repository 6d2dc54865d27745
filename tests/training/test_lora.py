"""Low-rank factors: merged before use, nothing else trained, and refused where the
kernel is trained too.
"""

import jax
import numpy as np
import pytest

from dicetalk_jax import parallel
from dicetalk_jax.errors import ConfigError
from dicetalk_jax.training import lora
from dicetalk_jax.training.loop import train
from tests.training import toy

ONE = parallel.make_mesh(devices=jax.devices()[:1])
RANK = dict(rank=2, alpha=6.0, targets=(r'hidden\.kernel$',))


def test_factors_begin_at_no_change_and_are_added_scaled():
  config = toy.get_config(lora=RANK | {'targets': ('kernel',)})
  params = {
    'net.hidden.kernel': np.ones((3, 3, 4, 5), np.float32),
    'net.hidden.bias': np.ones(5, np.float32),
  }
  extended = lora.extended(params, config)
  a, b = (extended[f'net.hidden.kernel.lora_{x}'] for x in 'ab')
  assert (
    a.shape == (36, 2)
    and b.shape == (2, 5)
    and a.std() == pytest.approx(1 / 6, rel=0.3)
  )
  np.testing.assert_equal(lora.merged(extended, config), params)
  b = np.random.default_rng(0).normal(size=b.shape)
  merged = lora.merged(extended | {'net.hidden.kernel.lora_b': b}, config)
  assert merged.keys() == params.keys()
  np.testing.assert_allclose(
    merged['net.hidden.kernel'], 1 + (3 * a @ b).reshape(3, 3, 4, 5), rtol=1e-6
  )
  assert lora.extended(params, toy.get_config()) == params


def test_only_factors_learn_and_the_export_is_whole(tmp_path):
  config = toy.get_config(lora=RANK, trainable=(), total_steps=8, accum=1)
  state = train(toy.ToyTask, config, tmp_path / 'run', mesh=ONE)
  factors = {'net.hidden.kernel.lora_a', 'net.hidden.kernel.lora_b'}
  assert set(state.params) == set(state.ema) == factors
  moments = {
    path[-1].key for path, x in jax.tree.leaves_with_path(state.opt_state) if x.ndim
  }
  assert moments == factors
  exported = np.load(tmp_path / 'run' / 'model' / 'run.npz')
  start = toy.ToyTask(config, ONE, tmp_path).init(jax.random.key(0))
  assert set(exported) == set(start)
  assert {name for name in exported if (exported[name] != start[name]).any()} == {
    'net.hidden.kernel'
  }
  update = exported['net.hidden.kernel'] - start['net.hidden.kernel']
  singular = np.linalg.svd(update, compute_uv=False)
  assert singular[1] > 0 and singular[2] < 1e-5 * singular[0]


@pytest.mark.parametrize(
  ('trainable', 'targets', 'sentence'),
  [
    (('all',), RANK['targets'], "both train 1 kernels, such as 'net.hidden.kernel'"),
    ((), ('nothing',), "'nothing' matches no kernel"),
  ],
)
def test_impossible_factors(tmp_path, trainable, targets, sentence):
  with pytest.raises(ConfigError, match=sentence):
    train(
      toy.ToyTask,
      toy.get_config(lora=RANK | {'targets': targets}, trainable=trainable),
      tmp_path / 'run',
    )


@pytest.mark.parametrize('init_from', ['run/model', 'link'])
def test_kernels_are_not_read_from_where_merged_ones_are_written(tmp_path, init_from):
  """A resumed run would merge its factors into kernels that have them already."""
  (tmp_path / 'run/model').mkdir(parents=True)
  (tmp_path / 'link').symlink_to(tmp_path / 'run/model')
  start = dict(trainable=(), init_from=str(tmp_path / init_from))
  with pytest.raises(
    ConfigError, match='would add its factors twice; choose another --workdir'
  ):
    train(toy.ToyTask, toy.get_config(lora=RANK, **start), tmp_path / 'run')
  for config in (
    toy.get_config(**start),
    toy.get_config(lora=RANK, **start | dict(init_from=str(tmp_path))),
  ):
    toy.ToyTask(config, ONE, tmp_path / 'run')

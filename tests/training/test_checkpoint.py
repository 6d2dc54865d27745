import functools

import grain
import jax
import numpy as np
import optax
import pytest

from dicetalk_jax import parallel
from dicetalk_jax.training.checkpoint import Checkpoints, has_checkpoint
from dicetalk_jax.training.state import init_state

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


def make_state(mesh, ema=True):
  params = {'net.kernel': np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32),
            'net.bias': np.arange(3, dtype=np.float32)}
  create = functools.partial(init_state, tx=TX, ema=ema)
  params = parallel.put_params(params, mesh)
  target = jax.eval_shape(create, params)
  shards = parallel.shardings(target, mesh)
  return jax.jit(create, out_shardings=shards)(params), parallel.with_shardings(target, shards)


def numbers():
  return iter(grain.MapDataset.range(100).seed(0).shuffle().repeat().batch(4).to_iter_dataset())


@pytest.mark.parametrize('ema', [True, False])
def test_resume_on_another_mesh(tmp_path, mesh, ema):
  state, _ = make_state(mesh, ema)
  data = numbers()
  for _ in range(3):
    next(data)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest is None
    checkpoints.save(3, state, data)
    wanted = [next(data) for _ in range(2)]  # going on at once does not change what was saved
  assert has_checkpoint(tmp_path)

  _, target = make_state(parallel.make_mesh(data=4), ema)
  data = numbers()
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(target, data)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  assert restored.params['net.kernel'].sharding.mesh.shape == {'data': 4, 'fsdp': 2}
  np.testing.assert_array_equal(wanted, [next(data) for _ in range(2)])


def test_latest_and_best_are_kept(tmp_path, mesh):
  state, _ = make_state(mesh, ema=False)
  scores = {1: 5.0, 2: 1.0, 3: 4.0, 4: None, 5: 3.0, 6: 2.0}
  with Checkpoints(tmp_path, keep=2, with_best=True) as checkpoints:
    for step, score in scores.items():
      checkpoints.save(step, state, numbers(), score)
  with Checkpoints(tmp_path, keep=2, with_best=True) as checkpoints:
    assert checkpoints.steps == [2, 5, 6]
    checkpoints.save(7, state, numbers(), 0.5)  # scores of an earlier process count
  with Checkpoints(tmp_path, keep=2, with_best=True) as checkpoints:
    assert checkpoints.steps == [6, 7]


def test_half_written_checkpoints_are_not_taken(tmp_path):
  (tmp_path / '8.orbax-checkpoint-tmp').mkdir()
  assert not has_checkpoint(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest is None

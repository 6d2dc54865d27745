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
  params = {
    'net.kernel': np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32),
    'net.bias': np.arange(3, dtype=np.float32),
  }
  create = functools.partial(init_state, tx=TX, ema=ema)
  params = parallel.put_params(params, mesh)
  target = jax.eval_shape(create, params)
  shards = parallel.shardings(target, mesh)
  return jax.jit(create, out_shardings=shards)(params), parallel.with_shardings(
    target, shards
  )


def numbers():
  return iter(
    grain.MapDataset.range(100).seed(0).shuffle().repeat().batch(4).to_iter_dataset()
  )


@pytest.mark.parametrize('ema', [True, False])
def test_resume_on_another_mesh(tmp_path, mesh, ema):
  state, _ = make_state(mesh, ema)
  data = numbers()
  for _ in range(3):
    next(data)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest is None
    checkpoints.save(3, state, data)
    wanted = [
      next(data) for _ in range(2)
    ]  # going on at once does not change what was saved
  assert has_checkpoint(tmp_path)

  # From eight devices to eight others, to two, to one; each saves what it restored.
  others = [
    parallel.make_mesh(fsdp=2, sequence=4),
    *(parallel.make_mesh(devices=jax.devices()[:n]) for n in (2, 1)),
  ]
  for step, other in enumerate(others, 4):
    data = numbers()
    with jax.set_mesh(other), Checkpoints(tmp_path) as checkpoints:
      _, target = make_state(other, ema)
      restored = checkpoints.restore(target, data)
      assert jax.tree.structure(restored) == jax.tree.structure(state)
      jax.tree.map(np.testing.assert_array_equal, restored, state)
      assert restored.params['net.kernel'].sharding.mesh == other
      (shard,) = {
        shard.data.shape
        for shard in restored.opt_state[1][0].mu['net.kernel'].addressable_shards
      }
      assert shard == (64, 128 // other.size)
      checkpoints.save(step, restored, data)
    np.testing.assert_array_equal(wanted, [next(data) for _ in range(2)])


def test_the_position_in_the_data_is_one_for_all_processes(tmp_path, mesh):
  state, _ = make_state(mesh)
  data = numbers()
  next(data)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, data)
  assert [path.read_text() for path in (tmp_path / '1' / 'data').glob('*.json')] == [
    '{"next_index": 1}'
  ]


def test_the_latest_are_kept(tmp_path, mesh):
  state, _ = make_state(mesh, ema=False)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3, 4):
      checkpoints.save(step, state, numbers())
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.steps == [3, 4]
    checkpoints.save(5, state, numbers())
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.steps == [4, 5]


def test_half_written_checkpoints_are_not_taken(tmp_path):
  (tmp_path / '8.orbax-checkpoint-tmp').mkdir()
  assert not has_checkpoint(tmp_path)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest is None

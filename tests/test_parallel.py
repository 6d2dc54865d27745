"""Meshes, layouts of parameters and batches, and processes that join each other."""

import types

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from dicetalk_jax import parallel
from dicetalk_jax.errors import MeshError


@pytest.mark.parametrize(
  ('sizes', 'shape'),
  [
    ({}, (1, 8, 1)),
    ({'data': 2}, (2, 4, 1)),
    ({'data': -1, 'fsdp': 1}, (8, 1, 1)),
    ({'data': 2, 'fsdp': 4}, (2, 4, 1)),
    ({'sequence': 2}, (1, 4, 2)),
  ],
)
def test_make_mesh(sizes, shape):
  assert dict(parallel.make_mesh(**sizes).shape) == dict(
    zip(('data', 'fsdp', 'sequence'), shape)
  )


@pytest.mark.parametrize(
  'sizes',
  [
    {'data': 3},
    {'data': 2, 'fsdp': 2},
    {'data': -1},
    {'data': 0},
    {'data': 16},
    {'data': 2, 'sequence': 3},
  ],
)
def test_mesh_that_does_not_fit_names_sizes(sizes):
  with pytest.raises(MeshError, match=f'data={sizes["data"]}'):
    parallel.make_mesh(**sizes)


def test_mesh_over_some_devices():
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  assert mesh.size == 1


def test_param_spec_takes_largest_dimension_that_divides(mesh):
  assert parallel.param_spec((3, 3, 64, 128), mesh) == P(None, None, None, 'fsdp')
  assert parallel.param_spec((64, 127), mesh) == P('fsdp', None)
  assert parallel.param_spec((127, 63), mesh) == P()
  assert parallel.param_spec((64,), mesh) == P()


def test_devices_that_share_frames_share_parameters_too():
  mesh = parallel.make_mesh(fsdp=4, sequence=2)
  assert parallel.param_spec((64, 128), mesh) == P(None, ('fsdp', 'sequence'))
  assert parallel.param_spec((3, 3, 130, 68), mesh) == P()


def test_a_whole_state_is_laid_out_by_shape(mesh):
  tree = {
    'opt': ({'unet.a.kernel': np.zeros((64, 128))}, np.zeros(())),
    'ema': {'vae.a.kernel': np.zeros((8, 8))},
  }
  specs = jax.tree.map(lambda s: s.spec, parallel.shardings(tree, mesh))
  assert specs == {
    'opt': ({'unet.a.kernel': P(None, 'fsdp')}, P()),
    'ema': {'vae.a.kernel': P()},
  }


def test_put_params_keeps_values_and_splits(mesh):
  params = {
    'a.kernel': np.arange(8192, dtype=np.float32).reshape(64, 128),
    'a.bias': jax.numpy.ones(3),
  }
  placed = parallel.put_params(params, mesh)
  assert placed['a.kernel'].addressable_shards[0].data.shape == (64, 32)
  jax.tree.map(np.testing.assert_array_equal, placed, params)


def test_put_batch_splits_rows_over_all_devices(mesh):
  batch = {'x': np.arange(48.0, dtype=np.float32).reshape(16, 3)}
  placed = parallel.put_batch(batch, mesh)['x']
  assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
  np.testing.assert_array_equal(placed, batch['x'])
  with pytest.raises(
    MeshError, match='batch_size=12 .* 8 devices; make it a multiple of 8'
  ):
    parallel.put_batch({'x': np.zeros((12, 3))}, mesh)


def test_check_batch_counts_micro_batches(mesh):
  parallel.check_batch(32, mesh, accum=4)
  with pytest.raises(MeshError, match='multiple of 32'):
    parallel.check_batch(16, mesh, accum=4)


def test_image_rows_are_split_between_devices_of_a_sequence():
  mesh = parallel.make_mesh(fsdp=2, sequence=4)
  video = np.random.default_rng(0).normal(size=(2, 3, 8, 6, 4)).astype(np.float32)
  with jax.set_mesh(mesh):
    batch = parallel.put_batch({'x': video}, mesh)
    split = jax.jit(parallel.split_pictures)(batch['x'])
    assert {shard.data.shape for shard in split.addressable_shards} == {(1, 3, 2, 6, 4)}
    np.testing.assert_array_equal(parallel.to_host(split), video)
    with pytest.raises(MeshError, match='sequence=4 .* frames of 6 rows'):
      jax.jit(parallel.split_pictures)(batch['x'].swapaxes(2, 3))
  assert parallel.split_pictures(video) is video


def _layout(processes, **shape):
  """A mesh as `batch_shard` sees it: devices that know their process."""
  devices = np.array(
    [types.SimpleNamespace(process_index=p) for p in processes], object
  )
  return types.SimpleNamespace(
    devices=devices.reshape(tuple(shape.values())), shape=shape, axis_names=tuple(shape)
  )


def test_batch_shard_of_processes():
  mesh = _layout([0, 0, 1, 1], data=1, fsdp=4)
  assert [parallel.batch_shard(mesh, p) for p in (0, 1)] == [(0, 2), (1, 2)]
  # An axis that does not split the batch spans both processes: they load the same rows.
  mesh = _layout([0, 1, 0, 1], data=1, fsdp=2, sequence=2)
  assert [parallel.batch_shard(mesh, p) for p in (0, 1)] == [(0, 1), (0, 1)]


@pytest.mark.parametrize(
  ('arguments', 'environment', 'sentence'),
  [
    (dict(multihost=True), {}, 'no TPU pod, Slurm, Kubernetes or MPI job was found'),
    (dict(coordinator='host:1234'), {}, 'multihost=False; set multihost=True'),
    (
      dict(multihost=True, process=0),
      {},
      'JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are not set',
    ),
    (
      dict(multihost=True),
      {'JAX_PROCESS_ID': '0'},
      'JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are not set',
    ),
    (
      dict(multihost=True, coordinator='host', processes=2, process=0),
      {},
      "HOST:PORT .* not 'host' and '0' of '2'",
    ),
    (
      dict(multihost=True, coordinator='host:1', processes=2, process=2),
      {},
      "'2' of '2'",
    ),
    (
      dict(multihost=True, coordinator='host:1', processes=2),
      {'JAX_PROCESS_ID': 'x'},
      "'x' of '2'",
    ),
  ],
)
def test_a_start_that_cannot_work_is_refused(
  monkeypatch, arguments, environment, sentence
):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)

  def refuse():
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(
    jax.distributed, 'initialize', refuse
  )  # as without a cluster; devices are in use here
  with pytest.raises(MeshError, match=sentence):
    parallel.initialize(**arguments)


def test_start_by_hand_takes_arguments_before_the_environment(monkeypatch):
  calls = []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda *args, **kwargs: calls.append(args)
  )
  for name, value in zip(parallel.VARIABLES, ('host:1234', '4', '3')):
    monkeypatch.setenv(name, value)
  parallel.initialize()
  parallel.initialize(True)
  parallel.initialize(True, process=0)
  assert calls == [('host:1234', 4, 3), ('host:1234', 4, 0)]

"""Devices to mesh, arrays to devices, processes to one program.

Models know nothing of this file. Parameters, moving averages and optimizer state are laid out by one
rule on name and shape; batches are split over all axes in `BATCH_AXES`.
"""

from collections.abc import Sequence
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from dicetalk_jax.errors import MeshError

BATCH_AXES = ('data', 'fsdp')

# (regular expression on the dotted parameter name, one entry of a PartitionSpec per dimension)
Rules = Sequence[tuple[str, Sequence[Any]]]


def start(multihost: bool = False) -> None:
  """Joins the other processes of a pod or cluster; call it before anything touches a device.

  Raises:
    MeshError: `multihost` without a cluster. Never passed over in silence: a pod that is set up
      wrongly would train as many separate jobs.
  """
  if not multihost:
    return
  try:
    jax.distributed.initialize()
  except ValueError as error:
    raise MeshError(f'multihost=True, but no TPU pod, Slurm, Kubernetes or MPI job was found ({error}); '
                    'set multihost=False to run on this machine alone') from error


def make_mesh(data: int = 1, fsdp: int = -1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh over all devices, or those given.

  Args:
    data: copies of the parameters; each sees other rows of the batch.
    fsdp: devices that share one copy of the parameters; each sees other rows of the batch.
      One of the sizes may be -1: all devices that the others leave.
    devices: default all devices of all processes.

  Raises:
    MeshError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {'data': data, 'fsdp': fsdp}
  asked = ', '.join(f'{axis}={size}' for axis, size in sizes.items())
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise MeshError(f'mesh sizes {asked}: each must be positive, and only one may be -1')
  rest, remainder = divmod(len(devices), math.prod(size for size in sizes.values() if size != -1))
  if remainder or not rest or (not free and rest != 1):
    raise MeshError(f'mesh sizes {asked} do not multiply to the {len(devices)} devices present; '
                    'change them, or set one to -1')
  sizes.update({axis: rest for axis in free})
  # Automatic axes: explicit ones reject a sharded kernel that meets a batch split over the same axis.
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices)


def param_spec(name: str, shape: Sequence[int], mesh: Mesh, rules: Rules = (), min_size: int = 2**12) -> P:
  """The first rule whose pattern is found in `name`; else 'fsdp' over the largest dimension that divides.

  Arrays of less than `min_size` elements are copied: gathering them would cost more than it saves.
  """
  for pattern, spec in rules:
    if re.search(pattern, name):
      return P(*spec)
  if math.prod(shape) >= min_size:
    for d in sorted(range(len(shape)), key=lambda d: -shape[d]):
      if shape[d] % mesh.shape['fsdp'] == 0:
        return P(*('fsdp' if i == d else None for i in range(len(shape))))
  return P()


def _dotted_name(path) -> str:
  """The parameter's name within any tree of flat dicts: the innermost string key."""
  keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
  return keys[-1] if keys else jax.tree_util.keystr(path)


def shardings(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
  """A NamedSharding per leaf of flat parameters, or of a whole training state made from them."""
  return jax.tree.map_with_path(
      lambda path, x: NamedSharding(mesh, param_spec(_dotted_name(path), x.shape, mesh, rules)), tree)


def with_shardings(tree: Any, shards: Any) -> Any:
  """Abstract arrays that carry their sharding: the target of restoring a checkpoint."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shards)


def put_params(params: Any, mesh: Mesh, rules: Rules = ()) -> Any:
  """Places flat parameters, or a tree of them, by rule.

  Arrays that one process holds whole must be equal on all processes; each then sends only its own slices.
  """
  def put(x, sharding):
    if isinstance(x, jax.Array) and (sharding.is_fully_addressable or not x.is_fully_addressable):
      return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
  return jax.tree.map(put, params, shardings(params, mesh, rules))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The first dimension over all batch axes, the others whole."""
  return NamedSharding(mesh, P(BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
  """How many different slices of a batch the devices hold."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_shard(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
  """(index, count) of the distinct batch slice that a process must load; default this process.

  Processes get the same index where an axis that does not split the batch spans them.
  """
  process = jax.process_index() if process is None else process
  axes = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
  rows = np.moveaxis(mesh.devices, axes, range(len(axes))).reshape(batch_devices(mesh), -1)
  groups = list(dict.fromkeys(frozenset(d.process_index for d in row) for row in rows))
  index, = (i for i, group in enumerate(groups) if process in group)
  return index, len(groups)


def check_batch(batch_size: int, mesh: Mesh, accum: int = 1) -> None:
  """Raises MeshError unless every device gets the same number of rows in each of `accum` micro-batches."""
  devices = batch_devices(mesh)
  if batch_size < 1 or accum < 1 or batch_size % (accum * devices):
    parts = f'{devices} devices' + (f' times {accum} micro-batches' if accum != 1 else '')
    raise MeshError(f'batch_size={batch_size} does not divide over {parts}; make it a multiple of {accum * devices}')


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Global arrays from this process's rows.

  Args:
    batch: tree of NumPy arrays `[rows, ...]`: the rows of slice `batch_shard(mesh)`.
    mesh: from `make_mesh`.

  Returns:
    The same tree of arrays `[rows * count, ...]`, split over `BATCH_AXES`.

  Raises:
    MeshError: the rows do not divide over the devices.
  """
  sharding, (_, count) = batch_sharding(mesh), batch_shard(mesh)

  def put(x):
    x = np.asarray(x)  # also unwraps the shared-memory arrays of Grain's workers
    check_batch(len(x) * count, mesh)
    return jax.make_array_from_process_local_data(sharding, x)
  return jax.tree.map(put, batch)

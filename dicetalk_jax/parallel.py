"""Meshes of devices, arrays laid out on them, and processes that work together.

Models know nothing of this file. Parameters, EMA and optimizer state are laid out by
one rule on their shape; batches are split over all axes in `BATCH_AXES`, and each frame
over 'sequence'.
"""

from collections.abc import Sequence
import math
import os
import re
from typing import Any

import jax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from dicetalk_jax.errors import MeshError

BATCH_AXES = ('data', 'fsdp')
PARAM_AXES = ('fsdp', 'sequence')
# Environment variables in place of the arguments of `initialize`.
VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def initialize(
  multihost: bool = False, coordinator: str = '', processes: int = 0, process: int = -1
) -> None:
  """Joins the other processes of a pod or cluster; call it before anything touches a
  device.

  On TPU pods, Slurm, Kubernetes (with the `kubernetes` package) and Open MPI, jax finds
  the other processes by itself. Elsewhere all three of the other arguments are needed,
  here or in the environment (`VARIABLES`).

  Args:
    multihost: False: this process is alone.
    coordinator: HOST:PORT of process 0, where all can reach it.
    processes: how many there are.
    process: which one this is, from 0.

  Raises:
    MeshError: `multihost` without a cluster, or the arguments are incomplete or
      impossible. This is never ignored: a pod that is set up wrongly would train as
      many separate jobs.
  """
  if not multihost:
    if coordinator or processes or process >= 0:
      raise MeshError(
        'a coordinator, a number of processes or a process is given, but '
        'multihost=False; set multihost=True to train on several machines'
      )
    return

  # Arguments come before the environment.
  arguments = (
    coordinator,
    str(processes) if processes else '',
    str(process) if process >= 0 else '',
  )
  given = {
    name: argument or os.environ.get(name, '')
    for name, argument in zip(VARIABLES, arguments)
  }
  # An address alone may be set by a cluster.
  _, number_of_processes, process_id = given.values()
  by_hand = bool(coordinator or number_of_processes or process_id)
  try:
    if by_hand:
      jax.distributed.initialize(
        *_explicit_cluster(given), cluster_detection_method='deactivate'
      )
    else:
      jax.distributed.initialize()
  except ValueError as error:
    raise MeshError(
      'multihost=True, but no TPU pod, Slurm, Kubernetes or MPI job was found '
      f'({error}); set multihost=False to run on this machine alone, or set '
      f'{", ".join(VARIABLES)}'
    ) from error
  except RuntimeError as error:
    cause = str(error).partition('\n')[0]
    raise MeshError(
      f'could not join the other processes ({cause}); start all within five minutes, '
      'where they can reach process 0'
    ) from error


def _explicit_cluster(given: dict[str, str]) -> tuple[str, int, int]:
  """Returns address, number of processes, and which one this is."""
  missing = [name for name, value in given.items() if not value]
  if missing:
    raise MeshError(
      f'several processes started by hand need all of {", ".join(VARIABLES)}; '
      f'{" and ".join(missing)} are not set'
    )
  address, processes, process = given.values()
  is_address = re.fullmatch(r'.+:\d+', address)
  are_numbers = processes.isdigit() and process.isdigit()
  if is_address and are_numbers and int(process) < int(processes):
    return address, int(processes), int(process)
  raise MeshError(
    'the coordinator must be HOST:PORT and the process a number below the number of '
    f'processes, not {address!r} and {process!r} of {processes!r}'
  )


def make_mesh(
  data: int = 1,
  fsdp: int = -1,
  sequence: int = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Makes a mesh over all devices, or those given.

  Args:
    data: copies of the parameters; each sees other rows of the batch.
    fsdp: devices that share one copy of the parameters; each sees other rows of the
      batch.
    sequence: devices that split the image height of every frame (`split_pictures`),
      and share the copy of the parameters.
    devices: default all devices of all processes.

  One of the sizes may be -1: all devices that the others leave.

  Raises:
    MeshError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {'data': data, 'fsdp': fsdp, 'sequence': sequence}
  asked = ', '.join(f'{axis}={size}' for axis, size in sizes.items())
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = [size for size in sizes.values() if size != -1]
  if len(free) > 1 or any(size < 1 for size in fixed):
    raise MeshError(
      f'mesh sizes {asked}: each must be positive, and only one may be -1'
    )
  rest, remainder = divmod(len(devices), math.prod(fixed))
  if remainder or not rest or (not free and rest != 1):
    raise MeshError(
      f'mesh sizes {asked} do not multiply to the {len(devices)} devices present; '
      'change them, or set one to -1'
    )
  for axis in free:
    sizes[axis] = rest
  # Automatic axes: explicit ones reject a sharded kernel that meets a batch split over
  # the same axis.
  return jax.make_mesh(
    tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices
  )


def param_spec(
  shape: Sequence[int], mesh: Mesh | AbstractMesh, min_size: int = 2**12
) -> P:
  """Splits the largest dimension that divides over `PARAM_AXES`.

  Arrays of less than `min_size` elements are copied: gathering them would cost more
  than it saves.
  """
  if math.prod(shape) < min_size:
    return P()
  axes = tuple(axis for axis in PARAM_AXES if mesh.shape.get(axis, 1) > 1)
  if not axes:
    axes = PARAM_AXES[:1]
  count = math.prod(mesh.shape[axis] for axis in axes)
  for dimension in sorted(range(len(shape)), key=lambda i: -shape[i]):
    if shape[dimension] % count == 0:
      entries: list[Any] = [None] * len(shape)
      entries[dimension] = axes if len(axes) > 1 else axes[0]
      return P(*entries)
  return P()


def shardings(tree: Any, mesh: Mesh) -> Any:
  """Returns a NamedSharding per leaf of flat parameters, or of a whole training state
  made from them.
  """
  return jax.tree.map(lambda x: NamedSharding(mesh, param_spec(x.shape, mesh)), tree)


def with_shardings(tree: Any, shards: Any) -> Any:
  """Returns abstract arrays with shardings: the target of restoring a checkpoint."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shards
  )


def put_params(params: Any, mesh: Mesh) -> Any:
  """Lays out flat parameters, or a tree of them.

  Arrays that one process holds whole must be equal on all processes; each then sends
  only its own slices.
  """

  def put(x, sharding):
    if isinstance(x, jax.Array):
      spans_processes = not x.is_fully_addressable
      if sharding.is_fully_addressable or spans_processes:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(put, params, shardings(params, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Splits the first dimension over all batch axes, and leaves the others whole."""
  return NamedSharding(mesh, P(BATCH_AXES))


def batch_devices(mesh: Mesh) -> int:
  """Returns how many different slices of a batch the devices hold."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_shard(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
  """Returns (index, count) of the distinct batch slice that a process must load.

  Processes get the same index if an axis that does not split the batch spans them.

  Args:
    mesh: from `make_mesh`.
    process: default this process.
  """
  process = jax.process_index() if process is None else process

  # One row per slice of the batch: the devices that share it.
  axes = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
  devices = np.moveaxis(mesh.devices, axes, range(len(axes)))
  rows = devices.reshape(batch_devices(mesh), -1)

  # The processes of each row; rows of the same processes make one slice to load.
  groups: list[set[int]] = []
  for row in rows:
    group = {device.process_index for device in row}
    if group not in groups:
      groups.append(group)
  (index,) = [i for i, group in enumerate(groups) if process in group]
  return index, len(groups)


def check_batch(batch_size: int, mesh: Mesh, accum: int = 1) -> None:
  """Raises MeshError unless every device gets the same number of rows in each of
  `accum` micro-batches.
  """
  devices = batch_devices(mesh)
  if batch_size < 1 or accum < 1 or batch_size % (accum * devices):
    parts = f'{devices} devices'
    if accum != 1:
      parts += f' times {accum} micro-batches'
    raise MeshError(
      f'batch_size={batch_size} does not divide over {parts}; make it a multiple of '
      f'{accum * devices}'
    )


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Makes global arrays from this process's rows.

  Args:
    batch: tree of NumPy arrays `[rows, ...]`: the rows of slice `batch_shard(mesh)`.
    mesh: from `make_mesh`.

  Returns:
    The same tree of arrays `[rows * count, ...]`, split over `BATCH_AXES`.

  Raises:
    MeshError: the rows do not divide over the devices.
  """
  sharding = batch_sharding(mesh)
  _, count = batch_shard(mesh)

  def put(x):
    x = np.asarray(x)  # also unwraps the shared-memory arrays of Grain's workers
    check_batch(len(x) * count, mesh)
    return jax.make_array_from_process_local_data(sharding, x)

  return jax.tree.map(put, batch)


def split_pictures(x: jax.Array) -> jax.Array:
  """Splits `[B,F,H,W,C]`: rows of the batch over `BATCH_AXES`, rows of each frame over
  'sequence'. Traced.

  What follows keeps the layout by itself: convolutions exchange border rows, spatial
  attention gathers keys and values, all that runs along time stays where it is. (The
  number of frames, 25, would not divide.)

  Raises:
    MeshError: the height does not divide.
  """
  parts = jax.sharding.get_abstract_mesh().shape.get('sequence', 1)
  if parts == 1:
    return x
  if x.shape[2] % parts:
    raise MeshError(
      f'sequence={parts} devices cannot split frames of {x.shape[2]} rows; choose a '
      'divisor of that'
    )
  return lax.with_sharding_constraint(x, P(BATCH_AXES, None, 'sequence'))


def to_host(tree: Any) -> Any:
  """Copies global arrays to NumPy arrays, on every process; all processes must call it
  together.
  """

  def copy(x):
    if isinstance(x, jax.Array):
      is_here = x.is_fully_addressable or x.is_fully_replicated
      if not is_here:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(copy, tree)

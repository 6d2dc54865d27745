"""The stream of a whole job, shared among its processes."""

from typing import Any

import grain

from dicetalk_jax.errors import ConfigError


class ProcessShard(grain.MapDataset):
  """The rows of one process: a consecutive share of each global batch.

  Row r of global batch n is element `n * rows * count + r` of the stream, for any
  number of processes. Together they read exactly what one process would, so a single
  counter is the position of all of them.
  """

  def __init__(self, stream: grain.MapDataset, rows: int, shard: tuple[int, int]):
    """Takes the part of a stream that belongs to one process.

    Args:
      stream: elements of the whole job.
      rows: per batch of this process.
      shard: (index, count) of this process.

    Raises:
      ConfigError: there is no such shard.
    """
    super().__init__(stream)
    self._rows = rows
    self._index, self._count = shard
    if not 0 <= self._index < self._count:
      raise ConfigError(
        f'shard {self._index} of {self._count} does not exist; shards are 0 to '
        f'{self._count - 1}'
      )

  def __len__(self) -> int:
    return len(self._parent) // self._count

  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    batch, row = divmod(index, self._rows)
    return self._parent[(batch * self._count + self._index) * self._rows + row]

"""What a conversion tells at its end."""

from collections.abc import Iterable, Mapping
import math
from typing import Any, NamedTuple


class Row(NamedTuple):
  """One component, or one published file."""

  name: str
  read: int  # number of tensors
  mapped: int
  parameters: int
  size: int  # bytes
  dtypes: str

  @property
  def left_over(self) -> int:
    return self.read - self.mapped


def row(name: str, read: int, mapped: Mapping[str, Any]) -> Row:
  """The row of what was mapped from `read` tensors; anything with a shape and a
  dtype will do.
  """
  sizes = {key: math.prod(x.shape) for key, x in mapped.items()}
  return Row(
    name,
    read,
    len(mapped),
    sum(sizes.values()),
    sum(size * mapped[key].dtype.itemsize for key, size in sizes.items()),
    _dtypes([str(x.dtype).removeprefix('torch.') for x in mapped.values()]),
  )


def _dtypes(names: list[str]) -> str:
  """`float16`, or each type with its number of tensors."""
  kinds = sorted(set(names)) or ['none']
  return (
    kinds[0]
    if len(kinds) == 1
    else ', '.join(f'{kind} x{names.count(kind)}' for kind in kinds)
  )


def show(rows: Iterable[Row], sources: Mapping[str, str], notes: Iterable[str]) -> None:
  """Prints the table, the digests of the sources, and the notes."""
  print(
    f'{"component":16} {"read":>6} {"mapped":>6} {"left over":>9} {"parameters":>13} '
    f'{"bytes":>13}  dtype'
  )
  for x in rows:
    print(
      f'{x.name:16} {x.read:6} {x.mapped:6} {x.left_over:9} {x.parameters:13,} '
      f'{x.size:13,}  {x.dtypes}'
    )
  for name, digest in sources.items():
    print(f'sha256 {digest}  {name}')
  for note in notes:
    print(f'note: {note}')

"""The summary that every conversion prints at its end."""

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
  """Makes the row of `mapped`, which came from `read` tensors.

  The values of `mapped` may be anything with a shape and a dtype.
  """
  counts = {key: math.prod(x.shape) for key, x in mapped.items()}
  return Row(
    name,
    read=read,
    mapped=len(mapped),
    parameters=sum(counts.values()),
    size=sum(count * mapped[key].dtype.itemsize for key, count in counts.items()),
    dtypes=_dtypes([str(x.dtype).removeprefix('torch.') for x in mapped.values()]),
  )


def _dtypes(names: list[str]) -> str:
  """`float16`, or each dtype with its number of tensors."""
  different = sorted(set(names)) or ['none']
  if len(different) == 1:
    return different[0]
  return ', '.join(f'{dtype} x{names.count(dtype)}' for dtype in different)


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

"""Counts what the devices of a compiled program exchange."""

import collections
import math
import re

BITS = {'pred': 8, 'bf16': 16}  # of types whose names do not end with them

_RESULT = re.compile(
  r'^\s*(?:ROOT )?%?[\w.-]+ = (?P<types>.*?) '
  r'(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)'
  # What runs in the background gives its result when it is done.
  r'(?:-done)?\((?P<rest>.*)'
)


def results(program: str) -> list[tuple[str, int, str]]:
  """Lists kind, bytes of the result and origin of every collective.

  Those in loops are listed once, however often they run.

  Args:
    program: text of an optimised HLO module.
  """
  found = []
  for line in program.splitlines():
    match = _RESULT.match(line)
    if match:
      origin = re.search(r'op_name="([^"]*)"', match['rest'])
      name = origin[1] if origin else ''
      found.append((match['kind'], size(match['types']), name))
  return found


def summary(program: str) -> dict[str, dict[str, float]]:
  """Returns the number of each kind of collective, and 1e9 bytes of their results."""
  counts: collections.Counter[str] = collections.Counter()
  sizes: collections.Counter[str] = collections.Counter()
  for kind, nbytes, _ in results(program):
    counts[kind] += 1
    sizes[kind] += nbytes
  return {
    kind: {'count': count, 'gb': round(sizes[kind] / 1e9, 3)}
    for kind, count in sorted(counts.items())
  }


def size(types: str) -> int:
  """Bytes of a type, or of a tuple of types, such as 'bf16[4,8]{1,0}'."""
  total = 0
  for element, dimensions in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', types):
    bits = BITS.get(element) or int(re.sub(r'\D', '', element))
    count = math.prod(int(n) for n in dimensions.split(',') if n)
    total += count * bits // 8
  return total

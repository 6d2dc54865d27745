"""Prints how long each test file takes, longest first, as a table.

  make test TEST_FLAGS=--junitxml=report.xml
  python -m tools.durations report.xml

What a fixture costs counts for the file that needs it first.
"""

import argparse
import collections
from xml.etree import ElementTree

SHORTEST = 10  # seconds of a file that has a row of its own


def seconds_by_file(report: str) -> dict[str, float]:
  """The time of each file, below tests/, in seconds."""
  seconds: dict[str, float] = collections.defaultdict(float)
  for case in ElementTree.parse(report).iter('testcase'):
    module = case.get('classname', '').removeprefix('tests.')
    seconds[module.replace('.', '/') + '.py'] += float(case.get('time', 0))
  return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def table(seconds: dict[str, float]) -> str:
  """A Markdown table of the longest files, and the rest in one row."""
  long = {name: s for name, s in seconds.items() if s >= SHORTEST}
  rest = sum(seconds.values()) - sum(long.values())
  rows = [
    *((f'`{name}`', s) for name, s in long.items()),
    (f'{len(seconds) - len(long)} other files', rest),
  ]
  lines = [f'| {name} | {s:.0f} |' for name, s in rows]
  return '\n'.join(['| file | seconds |', '| --- | ---: |', *lines])


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('report', metavar='REPORT.xml', help='from pytest --junitxml')
  print(table(seconds_by_file(parser.parse_args().report)))

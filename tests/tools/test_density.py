"""The density table: a snippet counted by hand, and the layout of the table."""

import math

import pytest

from tools import density

# 16 lines, 2 of them blank. The docstrings have 1 and 3 lines, the function 14.
SNIPPET = '''"""A module."""

def f(x, y):
  """One.

  Two."""
  # A comment.
  a, b = x, y  # after code
  if a:
    g = lambda: 1
  elif b:
    g = 2 if y else 3
  a = 1
  b = 2
  c = a
  return c
'''
WIDE_COMMENT = '#' + 100 * 'x' + '\n'


def test_each_measure_of_a_snippet_is_what_a_count_by_hand_gives():
  assert len(SNIPPET.splitlines()) == 16
  got = density.measure([SNIPPET, WIDE_COMMENT])
  # Lines 8 to 16: 13 nodes in the packing, 20 in the branches, 16 in what follows.
  assert got.nodes_median == pytest.approx(49 / 9)
  assert got.nodes_p90 == pytest.approx(49 / 9)
  characters = sum(len(line) for line in SNIPPET.splitlines()) + 101
  assert got.line_length == pytest.approx(characters / 15)
  assert got.wide == pytest.approx(1 / 15)
  assert got.comments == pytest.approx(2 / 17)
  assert got.docstrings == pytest.approx(4 / 17)
  assert got.lambdas == pytest.approx(1000 / 15)
  assert got.conditionals == pytest.approx(1000 / 15)
  assert got.packings == pytest.approx(1000 / 15)
  assert got.longest == 14


def test_a_hash_within_a_string_is_not_a_comment():
  assert density.measure(['text = """\n# no comment\n"""\n']).comments == 0


def test_functions_of_fewer_than_eight_lines_do_not_count():
  seven = 'def f():\n' + '  a = 1\n' * 7
  eight = 'def f():\n' + '  a = 1\n' * 8
  assert math.isnan(density.measure([seven]).nodes_median)
  assert density.measure([eight]).nodes_median == 4
  assert density.measure([seven, eight]).nodes_median == 4


def test_the_table_has_a_row_for_each_measure_and_a_column_for_each_code_base():
  lines = density.table(density.measure([SNIPPET])).splitlines()
  names, rows = lines[: lines.index('')], lines[lines.index('') + 2 :]
  assert len(names) == len(density.OTHERS) + 1
  assert len(rows) == len(density.Density._fields)
  assert rows[0].split()[-len(names) :] == [
    '5.4',
    '7.6',
    '7.8',
    '5.7',
    '6.0',
    '6.2',
    '10.9',
    '6.8',
  ]

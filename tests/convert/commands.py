"""Runs `python -m convert` in this process."""

import pytest

from convert import __main__ as command


def run_convert(*args) -> int:
  """Runs a command of the converter, and returns its exit code."""
  with pytest.raises(SystemExit) as stop:
    command.run_command([str(arg) for arg in args])
  return stop.value.code

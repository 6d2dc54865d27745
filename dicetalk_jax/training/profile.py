"""A profile of some steps on request: when devices and host did what, for TensorBoard
or Perfetto.
"""

import re
from typing import Any

from etils import epath
import jax

from dicetalk_jax.errors import ConfigError

Span = tuple[int, int]  # first and last step


def parse_span(text: str) -> Span | None:
  """Turns 'START:COUNT' into the first and the last step of a profile; '' into None.

  Raises:
    ConfigError: the text has another form, or there is no such step.
  """
  if not text:
    return None
  found = re.fullmatch(r'([1-9]\d*):([1-9]\d*)', text)
  if not found:
    raise ConfigError(
      f'--profile={text} does not name any steps; give the first one and how many, '
      'such as --profile=20:5'
    )
  start, count = map(int, found.groups())
  return start, start + count - 1


def check_span(span: Span | None, total_steps: int) -> None:
  """Raises ConfigError if a run of `total_steps` does not make all steps of `span`."""
  if span is None:
    return
  first, last = span
  if not 1 <= first <= last <= total_steps:
    raise ConfigError(
      f'steps {first} to {last} cannot be profiled: this run makes steps 1 to '
      f'{total_steps}; choose some of these with --profile'
    )


class Profiler:
  """Profiles the steps of a span. Leaving the context ends an unfinished profile.

  Attributes:
    span: first and last step of the profile, or None.
    missed: the run resumes after the first step of the span, so there is no profile.
  """

  def __init__(self, folder: epath.Path, span: Span | None, first_step: int):
    """Prepares a profile in `folder`, for a run whose next step is `first_step`."""
    self.span = span
    self.missed = span is not None and span[0] < first_step
    self._folder = folder
    self._running = False

  def before(self, step: int) -> None:
    """Starts the profile if this step is its first."""
    if self.span and step == self.span[0]:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, result: Any) -> bool:
    """Ends the profile if this step is its last, and returns whether it was.

    Args:
      step: the step that was just dispatched.
      result: what it computes; awaited before the profile ends.
    """
    if not self._running or self.span is None or step != self.span[1]:
      return False
    jax.block_until_ready(result)
    self._stop()
    return True

  def __enter__(self) -> 'Profiler':
    return self

  def __exit__(self, *exc_info) -> None:
    self._stop()

  def _stop(self) -> None:
    if self._running:
      self._running = False
      jax.profiler.stop_trace()

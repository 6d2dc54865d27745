"""A profile of some steps on request: what the devices and the host did when, for
TensorBoard or Perfetto.
"""

import re
from typing import Any

from etils import epath
import jax

from dicetalk_jax.errors import ConfigError


def parse_span(text: str) -> tuple[int, int] | None:
  """'START:COUNT' to the first and the last step of a profile; '' to None.

  Raises:
    ConfigError: the text is something else, or there is no such step.
  """
  if not text:
    return None
  found = re.fullmatch(r'([1-9]\d*):([1-9]\d*)', text)
  if not found:
    raise ConfigError(
      f'--profile={text} names no steps; give the first one and how many, such as '
      '--profile=20:5'
    )
  start, count = map(int, found.groups())
  return start, start + count - 1


def check_span(span: tuple[int, int] | None, total_steps: int) -> None:
  """Raises ConfigError where a run of so many steps does not make all those of
  `span`.
  """
  if span and not 1 <= span[0] <= span[1] <= total_steps:
    raise ConfigError(
      f'steps {span[0]} to {span[1]} cannot be profiled, this run makes 1 to '
      f'{total_steps}; choose some of these with --profile'
    )


class Profiler:
  """Use as a context around the steps; leaving it ends a profile that is under way.

  Attributes:
    missed: the run goes on behind the beginning of the span, so that there will be no
      profile.
  """

  def __init__(self, folder: epath.Path, span: tuple[int, int] | None, first_step: int):
    """`span`: first and last step, of a run that goes on with `first_step`."""
    self.missed = span is not None and span[0] < first_step
    self._folder, self._span, self._running = (
      folder,
      None if self.missed else span,
      False,
    )

  def before(self, step: int) -> None:
    if self._span and step == self._span[0]:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, result: Any) -> bool:
    """Whether the profile is now complete; `result` is what the step computes, maybe
    still on its way.
    """
    if not self._running or step != self._span[1]:
      return False
    jax.block_until_ready(result)
    self._stop()
    return True

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self._stop()

  def _stop(self) -> None:
    if self._running:
      self._running = False
      jax.profiler.stop_trace()

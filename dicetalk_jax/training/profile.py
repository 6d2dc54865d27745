"""A profile of some steps on request: what the devices and the host did when, for TensorBoard or Perfetto."""

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
    raise ConfigError(f'--profile={text} names no steps; give the first one and how many, such as --profile=20:5')
  start, count = map(int, found.groups())
  return start, start + count - 1


class Profiler:
  """Use as a context around the steps; leaving it ends a profile that is under way."""

  def __init__(self, folder: epath.Path, span: tuple[int, int] | None, first_step: int, total_steps: int):
    """`span`: first and last step, of a run that makes `first_step` to `total_steps`.

    Raises:
      ConfigError: the run does not make all these steps.
    """
    self._folder, self._span, self._running = folder, span, False
    if span and not first_step <= span[0] <= span[1] <= total_steps:
      raise ConfigError(f'steps {span[0]} to {span[1]} cannot be profiled, this run makes {first_step} to '
                        f'{total_steps}; choose some of these with --profile')

  def before(self, step: int) -> None:
    if self._span and step == self._span[0]:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, result: Any) -> bool:
    """Whether the profile is now complete; `result` is what the step computes, maybe still on its way."""
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

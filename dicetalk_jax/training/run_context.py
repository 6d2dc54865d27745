"""Resources that a run holds open during its steps, and requests to stop it."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import signal

from etils import epath
import grain
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import ml_collections

from dicetalk_jax.training.checkpoint import Checkpoints
from dicetalk_jax.training.optimizer import make_schedule
from dicetalk_jax.training.prefetch import prefetched
from dicetalk_jax.training.profile import Profiler
from dicetalk_jax.training.run_log import Meter, RunLog, Writer
from dicetalk_jax.training.task import Task

StopSignal = Callable[[int], signal.Signals | None]


@dataclasses.dataclass(frozen=True)
class RunContext:
  """Resources that a run holds open; see `open_run`.

  Attributes:
    first_step: the first step to make: 1, or the one after the latest checkpoint.
    checkpoints: restores and saves the state.
    data: batches on the devices.
    stop_signal: takes a step, and returns the signal after which the run is to stop
      behind that step, if there was one; the same on all processes.
    log: terminal, files, images.
    meter: means of the metrics of the steps.
    profiler: records the steps that a profile was asked for.
    learning_rate: that of an update, by the number of updates before it.
  """

  first_step: int
  checkpoints: Checkpoints
  data: grain.DatasetIterator
  stop_signal: StopSignal
  log: RunLog
  meter: Meter
  profiler: Profiler
  learning_rate: Callable[[int], jax.Array]

  def announce_profile(self) -> None:
    """Says so if the steps to profile have been made already.

    The command that began the run, with its `--profile`, also resumes it.
    """
    if self.profiler.span and self.profiler.missed:
      first, last = self.profiler.span
      self.log.say(
        f'no profile of steps {first} to {last}: the run resumes after the first of '
        'them'
      )

  def log_means(
    self, step: int, means: dict[str, float], steps_per_second: float | None
  ) -> None:
    """Logs means of the metrics since the last time."""
    learning_rate = float(self.learning_rate(step - 1))
    self.log.train(step, {**means, 'lr': learning_rate}, steps_per_second)

  def close_log(self) -> None:
    """Logs the steps since the last time, if the run broke off there, and draws the
    curves.
    """
    left = self.meter.left()
    if left:
      step, means = left
      self.log_means(step, means, None)
    self.log.close()


@contextlib.contextmanager
def open_run(
  task: Task,
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  mesh: Mesh,
  make_writer: Callable[[epath.Path], Writer] | None,
  profile: tuple[int, int] | None,
) -> Iterator[RunContext]:
  """Opens checkpoints, data, log and profiler; arguments as in `loop.train`.

  Leaving the context closes them in reverse order, and waits for the last save.
  """
  with contextlib.ExitStack() as stack:
    # The loader first, since it may refuse: checkpoints are cleaned up in a background
    # thread, which would add its traceback.
    batches = stack.enter_context(contextlib.closing(task.batches()))
    checkpoints = stack.enter_context(Checkpoints(workdir / 'checkpoints', config.keep))
    done = checkpoints.latest or 0
    data = stack.enter_context(contextlib.closing(prefetched(batches, mesh)))
    stop_signal = stack.enter_context(_stop_signals())
    run = RunContext(
      first_step=done + 1,
      checkpoints=checkpoints,
      data=data,
      stop_signal=stop_signal,
      log=RunLog(workdir, make_writer, done, config.total_steps),
      meter=Meter(),
      profiler=Profiler(workdir / 'profile', profile, done + 1),
      learning_rate=jax.jit(make_schedule(config.optim, config.total_steps)),
    )
    stack.callback(run.close_log)
    stack.enter_context(run.profiler)
    yield run


@contextlib.contextmanager
def _stop_signals() -> Iterator[StopSignal]:
  """Yields a function that tells which signal, SIGTERM or Ctrl-C, asked to stop."""
  if jax.process_count() > 1:
    # jax.distributed listens for SIGTERM, and makes all processes agree on the step.
    def preempted(step: int) -> signal.Signals | None:
      reached = multihost_utils.reached_preemption_sync_point(step)
      return signal.SIGTERM if reached else None

    yield preempted
    return

  received: list[signal.Signals] = []

  def handle(number, frame):
    if received:  # a second signal acts at once
      signal.signal(number, previous[number])
      signal.raise_signal(number)
    received.append(signal.Signals(number))

  previous = {
    number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    yield lambda step: received[0] if received else None
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)

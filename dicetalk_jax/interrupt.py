"""Ctrl-C and SIGTERM in commands: one line, and nothing half-written is left behind."""

from collections.abc import Iterator
import contextlib
from multiprocessing import resource_tracker
import os
import select
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

# Exit codes as shells give them, and how the line begins.
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
WORDS = {signal.SIGINT: 'interrupted', signal.SIGTERM: 'terminated'}
REMEDY = 'run the same command again'

STDERR = 2
GRACE = 10.0  # seconds to clean up; then the process ends as it is
SAME = 1.0  # seconds in which a second signal, such as that of `make`, does not count


@contextlib.contextmanager
def ends_with_one_line() -> Iterator[None]:
  """Ends the process with one line on stderr if a person or the system stops it.

  The signal raises KeyboardInterrupt in the main thread, so everything that is open
  cleans up after itself, and the process exits with the code of `CODES`. Python handles
  a signal between two of its own steps only, and compiling a model is one step of
  minutes. Therefore a thread says at once that the signal was noticed, and ends the
  process after `GRACE` seconds, or at a second signal.

  Code that treats a signal in its own way for a while, as training does, replaces the
  handler for that time. A signal that is ignored, as in the background of a script,
  stays ignored.
  """
  if threading.current_thread() is not threading.main_thread():
    yield  # only the main thread may set handlers
    return
  stop = _Stop()
  read, write = os.pipe()
  os.set_blocking(write, False)
  previous = {
    number: signal.signal(number, stop.handle)
    for number in CODES
    if signal.getsignal(number) != signal.SIG_IGN
  }
  previous_write = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  threading.Thread(target=stop.watch, args=(read,), daemon=True).start()
  try:
    yield
  except KeyboardInterrupt:
    number = stop.number or signal.SIGINT
    if stop.number is None:  # something else than the handler raised it
      _print(number)
    sys.exit(CODES[number])
  finally:
    signal.set_wakeup_fd(previous_write)
    for number, handler in previous.items():
      signal.signal(number, handler)
    os.close(write)


def watch_imports() -> None:
  """Prints the line, and no traceback, if Ctrl-C comes before a command runs.

  Importing its libraries takes seconds. Does nothing but where `python -m` has just
  begun: then the command's package is imported, and the name of its file is not known.
  """
  if sys.argv[:1] == ['-m']:
    sys.excepthook = _print_error


def _print_error(
  kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
  if issubclass(kind, KeyboardInterrupt):
    _print(signal.SIGINT)
  else:
    sys.__excepthook__(kind, error, trace)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
  """Threads and processes that are started meanwhile never get Ctrl-C.

  A terminal sends it to all processes of a command. The one that started the others
  also ends them, and they would only add their tracebacks.
  """
  resource_tracker.ensure_running()  # first, since starting it lifts the mask
  mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Stop:
  """What happens at a signal.

  Attributes:
    number: the signal that was noticed; None before.
  """

  def __init__(self) -> None:
    self.number: signal.Signals | None = None
    self._raised = False
    self._lock = threading.RLock()  # the handler may interrupt whoever holds it

  def handle(self, number: int, frame: FrameType | None) -> None:
    """The handler, which Python calls in the main thread."""
    self._notice(signal.Signals(number))
    if not self._raised:  # cleaning up must not be interrupted
      self._raised = True
      raise KeyboardInterrupt

  def watch(self, read: int) -> None:
    """Follows the numbers of signals through a pipe, in a thread."""
    # 1. Until the first signal, or until the pipe is closed
    while self.number is None:
      data = os.read(read, 1)
      if not data:
        os.close(read)
        return
      number = data[0]
      if number in CODES and signal.getsignal(number) == self.handle:
        self._notice(signal.Signals(number))

    # 2. Until the time is over, or until another one
    now = time.monotonic()
    end = now + GRACE
    while now < end:
      if select.select([read], [], [], end - now)[0]:
        is_closed = not os.read(read, 1)
        if is_closed:
          time.sleep(end - now)
        elif time.monotonic() > end - GRACE + SAME:
          break
      now = time.monotonic()
    os._exit(CODES[self.number])

  def _notice(self, number: signal.Signals) -> None:
    with self._lock:
      if self.number is None:
        self.number = number
        _print(number)
        # Threads and libraries would add their tracebacks.
        with open(os.devnull, 'wb') as nowhere:
          os.dup2(nowhere.fileno(), STDERR)


def _print(number: signal.Signals) -> None:
  """Writes the line, below a progress bar if there is one."""
  tqdm = sys.modules.get('tqdm')
  has_bar = tqdm is not None and bool(getattr(tqdm.tqdm, '_instances', None))
  line = f'{WORDS[number]}; {REMEDY}\n'
  os.write(STDERR, f'\n{line}'.encode() if has_bar else line.encode())

"""One run at a time in a work directory.

`lock.json` in the work directory names the process that runs there. Two mechanisms show
whether it is still alive, since neither works everywhere:

1. The system's file lock, for processes of one kernel. It takes effect at once, two
   processes that start in the same instant cannot both get it, and it ends with its
   process, however that ends. So a run that was killed resumes at once. Process ids
   would not do: each container has a process 1. (POSIX locks rather than `flock`, which
   workers that a killed process leaves behind would inherit.)
2. A heartbeat, for other hosts: the holder changes the file every `BEAT` seconds. A
   process that starts elsewhere watches it. If it changes, the run is alive; if it
   stays the same for `PATIENCE` seconds, the host died, and the new process takes over.
   Clocks are never compared. This needs no locks: not all network disks have them, some
   only among the processes of one host, some keep those of a dead host, and buckets
   have none.

If only the heartbeat decides, the new holder waits `SETTLE` seconds and makes sure that
no other process wrote at the same time. A holder that was taken for dead (a suspended
machine) notices at its next beat, and `check` ends its run.
"""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from dicetalk_jax.errors import ConfigError, InputError

NAME = 'lock.json'
BEAT = 10.0
PATIENCE = 90.0  # network disks may show a change a minute late
SETTLE = 3.0

_MESSAGE = 2048  # bytes of the message from process 0 to the others
_YES = 'yes'
_NO = 'no'
_CLOSED = -1  # in place of a file descriptor
_ERRORS = {kind.__name__: kind for kind in (ConfigError, InputError)}


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator['Lock']:
  """Holds the work directory while the context lasts; all processes of a job call it.

  Process 0 takes the lock, and all agree on the outcome.

  Raises:
    ConfigError: another run is alive there. All processes raise it.
    InputError: the lock cannot be read or written. All processes raise it.
  """
  lock = Lock(workdir)
  try:
    while not _agreed(lock.attempt):
      time.sleep(min(1.0, SETTLE / 3))
    yield lock
  finally:
    lock.release()


def _agreed(ask: Callable[[], bool]) -> bool:
  """Asks process 0, and returns or raises its outcome on all processes.

  `ask` must not wait for long, since collective operations time out.
  """
  if jax.process_count() == 1:
    return ask()

  # Process 0 must not raise yet: the others would wait for it in vain.
  answer, sentence = '', ''
  if jax.process_index() == 0:
    try:
      answer = _YES if ask() else _NO
    except tuple(_ERRORS.values()) as error:
      answer, sentence = type(error).__name__, str(error)

  message = np.zeros(_MESSAGE, np.uint8)
  encoded = f'{answer} {sentence}'.encode()[:_MESSAGE]
  message[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  message = np.asarray(multihost_utils.broadcast_one_to_all(message))
  decoded = message.tobytes().rstrip(b'\0').decode(errors='ignore')

  answer, _, sentence = decoded.partition(' ')
  if answer in _ERRORS:
    raise _ERRORS[answer](sentence)
  return answer == _YES


class Lock:
  """The lock of one work directory: `attempt` until it is held, then `release`."""

  def __init__(self, workdir: epath.Path):
    self._workdir = workdir
    is_remote = '://' in os.fspath(workdir)
    path = workdir / NAME
    self._file: _Local | _Remote = _Remote(path) if is_remote else _Local(path)
    self._token = uuid.uuid4().hex
    self._kernel = _kernel()
    self._me = {
      'host': socket.gethostname(),
      'process': os.getpid(),
      'kernel': self._kernel,
      'since': time.strftime('%Y-%m-%d %H:%M:%S %z'),
      'token': self._token,
    }
    self._seen: str | None = None  # content that is being watched
    self._seen_at = 0.0
    self._written_at: float | None = None  # when, if it does not count at once
    self._beats = 0
    self._end = threading.Event()
    self._thread: threading.Thread | None = None
    self._lost = False

  def attempt(self) -> bool:
    """Tries to take the lock.

    Returns:
      Whether it is held. If not, try again in a second.

    Raises:
      ConfigError: another run holds it.
      InputError: the file cannot be read or written.
    """
    try:
      if self._written_at is not None:
        return self._settle(self._written_at)
      return self._try()
    except ConfigError:
      raise
    except Exception as error:  # buckets raise errors of many libraries
      raise InputError(
        f'cannot read or write {self._workdir / NAME} ({_cause(error)}); make it '
        'writable or choose another --workdir'
      ) from error

  def check(self) -> None:
    """Raises ConfigError if another run has taken over.

    All processes of a job call it at the same step, and all raise.
    """
    _agreed(self._kept)

  def _kept(self) -> bool:
    if self._lost:
      raise ConfigError(
        f'another run took over {self._workdir}, since this one gave no sign of life '
        f'for {PATIENCE:g} s; let that one run'
      )
    return True

  def release(self) -> None:
    """Frees the work directory if it is held."""
    self._end.set()
    held = self._thread is not None or self._written_at is not None
    if self._thread:
      self._thread.join()
    # The run is over, and its own error is the one to report.
    with contextlib.suppress(Exception):
      if held and not self._lost and self._mine():
        self._file.write('')
    self._file.close()
    self._thread = None
    self._written_at = None

  def _try(self) -> bool:
    alone = self._file.lock()  # None if there are no locks
    content = self._file.read()
    holder = _parsed(content)

    # Free, or held by a process of this kernel: the system knows whether that is alive.
    if not content and alone is not False:
      return self._take(sure=bool(alone))
    if holder.get('kernel') == self._kernel and alone is not None:
      if not alone:
        raise self._refusal(holder)
      return self._take(sure=True)

    # Otherwise: is there a heartbeat?
    now = time.monotonic()
    if self._seen is None:
      self._seen = content
      self._seen_at = now
      if content:
        print(
          f'{self._workdir} is in use by {_named(holder)}; waiting up to '
          f'{PATIENCE:g} s to see whether that is still alive',
          flush=True,
        )
    elif content != self._seen:
      raise self._refusal(holder)
    elif now - self._seen_at > PATIENCE and content:
      return self._take(sure=False)
    elif now - self._seen_at > PATIENCE:
      raise self._refusal(holder)
    self._file.close()  # when opened again, network disks show what is new
    return False

  def _take(self, sure: bool) -> bool:
    self._write()
    if sure:
      return self._begin()
    self._written_at = time.monotonic()
    return False

  def _settle(self, written_at: float) -> bool:
    if time.monotonic() - written_at < SETTLE:
      return False
    self._written_at = None
    content = self._file.read()
    if self._token in content:
      return self._begin()
    raise self._refusal(_parsed(content))

  def _begin(self) -> bool:
    self._thread = threading.Thread(target=self._beat, name='lock', daemon=True)
    self._thread.start()
    return True

  def _beat(self) -> None:
    while not self._end.wait(BEAT):
      # A disk or network may fail for a while.
      with contextlib.suppress(Exception):
        if not self._mine():
          self._lost = True
          return
        self._write()

  def _mine(self) -> bool:
    return self._token in self._file.read()

  def _write(self) -> None:
    self._beats += 1
    self._file.write(json.dumps({**self._me, 'beat': self._beats}) + '\n')

  def _refusal(self, holder: dict) -> ConfigError:
    self._file.close()
    return ConfigError(
      f'{self._workdir} is in use by {_named(holder)}; wait for that run to end, stop '
      'it, or choose another --workdir'
    )


class _Local:
  """The file on a disk.

  It stays open: closing it, or any other handle of it in this process, ends the lock.
  """

  def __init__(self, path: epath.Path):
    self._path = path
    self._handle = _CLOSED

  def lock(self) -> bool | None:
    """Whether this process got the system's lock; None if the disk has no locks."""
    self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
      return False
    except OSError:
      return None
    return True

  def read(self) -> str:
    return os.pread(self._handle, 1 << 16, 0).decode(errors='replace')

  def write(self, content: str) -> None:
    """In place, since the lock is on this file and not on one that takes its name."""
    data = content.encode()
    os.pwrite(self._handle, data, 0)
    os.ftruncate(self._handle, len(data))
    os.fsync(self._handle)

  def close(self) -> None:
    if self._handle != _CLOSED:
      os.close(self._handle)
      self._handle = _CLOSED


class _Remote:
  """The object in a bucket."""

  def __init__(self, path: epath.Path):
    self._path = path

  def lock(self) -> None:
    return None

  def read(self) -> str:
    return self._path.read_text() if self._path.exists() else ''

  def write(self, content: str) -> None:
    self._path.write_text(content)

  def close(self) -> None:
    """Does nothing: nothing is open."""


def _kernel() -> str:
  """Names the running system: containers of one machine share it, a reboot ends it."""
  path = pathlib.Path('/proc/sys/kernel/random/boot_id')
  return path.read_text().strip() if path.exists() else socket.gethostname()


def _cause(error: Exception) -> str:
  """The first line of an error's message, or its name if the message is empty."""
  text = str(getattr(error, 'strerror', None) or error).strip()
  return text.splitlines()[0] if text else type(error).__name__


def _parsed(content: str) -> dict:
  try:
    holder = json.loads(content)
  except ValueError:
    return {}
  return holder if isinstance(holder, dict) else {}


def _named(holder: dict) -> str:
  if not holder.get('token'):
    return 'another run'
  process, host, since = map(holder.get, ('process', 'host', 'since'))
  return f'process {process} on {host} since {since}'

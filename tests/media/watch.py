"""Proof that nothing was opened: a server without callers, files without readers."""

from collections.abc import Iterator
import contextlib
import ctypes
import os
import pathlib
import socket

_OPENED = 0x20  # IN_OPEN of inotify


@contextlib.contextmanager
def unopened(*paths: pathlib.Path) -> Iterator[None]:
  """Fails if one of the files is opened meanwhile, by Python or a library."""
  libc = ctypes.CDLL(None, use_errno=True)
  handle = libc.inotify_init1(os.O_NONBLOCK)
  assert handle >= 0, os.strerror(ctypes.get_errno())
  try:
    for path in paths:
      assert libc.inotify_add_watch(handle, os.fsencode(path), _OPENED) >= 0
    yield
    with contextlib.suppress(BlockingIOError):  # there is no event
      raise AssertionError(f'opened: {os.read(handle, 4096)!r}')
  finally:
    os.close(handle)


@contextlib.contextmanager
def uncalled() -> Iterator[int]:
  """Gives the port of a server on this machine; fails if it is called meanwhile."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    server.setblocking(False)
    yield server.getsockname()[1]
    with contextlib.suppress(BlockingIOError):  # nobody waits
      raise AssertionError(f'called: {server.accept()!r}')

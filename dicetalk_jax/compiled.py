"""Compiled programs, kept from one run to the next.

JAX's own variables and flags decide first:
* `JAX_COMPILATION_CACHE_DIR=DIR` keeps them in another place;
* `JAX_ENABLE_COMPILATION_CACHE=false` keeps none, as does an empty DIR.
"""

import os
import pathlib
import warnings

import jax

from dicetalk_jax.errors import Note

# Seconds. JAX keeps what compiles for a second or longer; a small model consists of
# many programs that take less.
SHORTEST = 0.1


def default_folder() -> pathlib.Path:
  """The user's cache folder: `~/.cache/dicetalk_jax`, or below `XDG_CACHE_HOME`.

  Raises:
    RuntimeError: the user has no home.
  """
  cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(cache, 'dicetalk_jax')


def keep_programs() -> None:
  """Lets a command keep what it compiles, since that takes minutes at full size.

  Call it before anything is compiled. Without a place to write to, nothing is kept and
  a note says so.
  """
  # jax adds its options at run time.
  chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
  enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
  if chosen is not None or not enabled:
    return
  try:
    folder = default_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
      raise PermissionError(f'{folder} is read-only')
  except (OSError, RuntimeError) as error:
    warnings.warn(
      Note(
        f'compiled programs are not kept ({error}); name a folder for them with '
        'JAX_COMPILATION_CACHE_DIR'
      ),
      stacklevel=2,
    )
    return
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', SHORTEST)

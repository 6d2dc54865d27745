"""Compiled programs, kept from one run to the next."""

import os
import pathlib

import jax


def keep_programs() -> None:
  """Stores compiled programs, since compiling takes minutes at full size.

  `JAX_COMPILATION_CACHE_DIR` moves the place.
  """
  # jax adds its options at run time.
  if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    folder = pathlib.Path(cache, 'dicetalk_jax')
    jax.config.update('jax_compilation_cache_dir', str(folder))

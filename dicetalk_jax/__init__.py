"""DICE-Talk (arXiv 2504.18087) in JAX: emotional talking portraits."""

from dicetalk_jax import interrupt, literal_glob

__version__ = '0.1.0'

interrupt.watch_imports()
literal_glob.install()

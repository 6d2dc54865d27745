"""DICE-Talk (arXiv 2504.18087) in JAX: emotional talking portraits."""

from dicetalk_jax import literal_glob

__version__ = '0.1.0'

literal_glob.install()

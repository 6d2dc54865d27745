"""DICE-Talk (arXiv 2504.18087) in JAX: emotional talking portraits, trained, sampled and evaluated."""

__version__ = '0.1.0'

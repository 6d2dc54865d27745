"""Parity with the reference implementation: golden files, and what reproduces them."""

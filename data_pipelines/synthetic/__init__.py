"""Procedural talking faces in pure NumPy, with exact truth for every frame.

A clip is a function of identity, emotion, intensity and speech. This package is frozen:
its output is the same to the bit on every machine, and stored data sets depend on it.
"""

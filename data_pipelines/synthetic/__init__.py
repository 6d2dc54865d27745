"""Procedural talking faces: identity x emotion x intensity x speech, with exact
truth for every frame. Pure numpy.
"""

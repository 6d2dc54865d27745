"""Procedural talking faces: identity x emotion x intensity x speech, with the exact truth of every frame. Pure numpy."""

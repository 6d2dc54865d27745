"""The judges of rendered faces: their training, and whether they notice faults."""

"""Codes -> trained coders: the step, the firing counters, and checkpoints."""

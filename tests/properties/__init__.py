"""Equalities that hold for every architecture, training step and format; a new one is tested by being listed."""

"""Implementations of a training step of one coder: forward, gradients, update."""

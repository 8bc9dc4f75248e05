"""Tokens -> activations: the frozen model, its hookpoints, capture, calibration and the mixing buffer."""

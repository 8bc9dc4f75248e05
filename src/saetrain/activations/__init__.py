"""From tokens to activations: the frozen model, hookpoints, capture, normalization and the shuffle buffer."""

"""Metrics of SAEs on held-out text: reconstruction, sparsity, decoder geometry, loss recovered, and the verdict."""

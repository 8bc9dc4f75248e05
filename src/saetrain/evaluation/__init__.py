"""Held-out tokens -> figures: reconstruction, sparsity, geometry."""

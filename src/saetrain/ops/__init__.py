"""The products of a TopK SAE: what they mean in plain PyTorch, and fast versions of them."""

from __future__ import annotations

from saetrain.ops.reference import sparse_decode, topk_relu

__all__ = ["sparse_decode", "topk_relu"]

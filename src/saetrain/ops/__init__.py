"""Sparse products of a TopK SAE: a reference in plain PyTorch, and fast versions in PyTorch, C++ and Triton."""

from __future__ import annotations

from saetrain.ops.reference import sparse_decode, topk_relu

__all__ = ["sparse_decode", "topk_relu"]

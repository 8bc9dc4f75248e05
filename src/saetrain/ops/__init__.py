"""Sparse products of an SAE: autograd functions in PyTorch, and kernels in C++ and Triton."""

from __future__ import annotations

from saetrain.ops.functions import (
    decode_codes,
    explicit_auxk,
    linear_topk,
    plain_products,
    reuse_gradients,
    uses_plain_products,
)

__all__ = ["decode_codes", "explicit_auxk", "linear_topk", "plain_products", "reuse_gradients", "uses_plain_products"]

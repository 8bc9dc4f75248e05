"""Sparse products of an SAE: autograd functions in PyTorch, and kernels in C++ and Triton."""

from __future__ import annotations

from saetrain.ops.functions import (
    decode_codes,
    explicit_auxk,
    linear_above,
    linear_topk,
    plain_products,
    reuse_gradients,
    uses_plain_products,
)
from saetrain.ops.selection import select_largest
from saetrain.ops.sparse import count_offsets

__all__ = [
    "count_offsets",
    "decode_codes",
    "explicit_auxk",
    "linear_above",
    "linear_topk",
    "plain_products",
    "reuse_gradients",
    "select_largest",
    "uses_plain_products",
]

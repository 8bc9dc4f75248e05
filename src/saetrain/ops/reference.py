"""Reference of the sparse products of a TopK SAE, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def topk_relu(pre_NF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (values, indices), both (N, k): ReLU of the k largest entries of each row.

    A row with fewer than k positive entries contains zeros, whose indices have no meaning.
    """
    values, indices = torch.topk(pre_NF, k, dim=1, sorted=False)
    return values.relu(), indices


def sparse_decode(values_NK: Tensor, indices_NK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Return Σ_k values · W_dec[indices], (N, D), without an (N, K, D) tensor; differentiable in values and weight."""
    return embedding_bag(indices_NK, W_dec_FD, per_sample_weights=values_NK, mode="sum")


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least ``number``, and at least 1."""
    return 1 << max(number - 1, 0).bit_length()

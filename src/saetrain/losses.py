"""Loss terms as pure functions: sums over tokens; the SAE's terms are divided by constants that the caller passes."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_error(x_ND: Tensor, reconstruction_ND: Tensor) -> Tensor:
    """Return Σ over tokens and dimensions of (x - x̂)², a scalar."""
    return torch.nn.functional.mse_loss(reconstruction_ND, x_ND, reduction="sum")


def reconstruction_loss(x_ND: Tensor, reconstruction_ND: Tensor, n_tokens: int, data_variance: Tensor) -> Tensor:
    """Return the micro-batch's share of the FVU of the step: Σ‖x - x̂‖² / (n_tokens · data_variance)."""
    return squared_error(x_ND, reconstruction_ND) / (n_tokens * data_variance)


def cross_entropy(log_probs_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return Σ over positions of -log q(target) in nats, a scalar; ``targets_N`` are int64 token ids."""
    return -log_probs_NV.gather(1, targets_N.unsqueeze(1)).sum()


def kl_divergence(clean_log_probs_NV: Tensor, log_probs_NV: Tensor) -> Tensor:
    """Return Σ over positions of KL(p‖q) in nats, a scalar.

    ``clean_log_probs_NV`` is log p and ``log_probs_NV`` is log q. The entropy of p is included, so that the result is
    zero if p and q are equal.
    """
    return (clean_log_probs_NV.exp() * (clean_log_probs_NV - log_probs_NV)).sum()

"""Loss terms as pure functions: sums over tokens, those of the SAE divided by constants that are handed in."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_error(x_ND: Tensor, reconstruction_ND: Tensor) -> Tensor:
    """Σ over tokens and dimensions of (x - x̂)², a scalar."""
    return (x_ND - reconstruction_ND).pow(2).sum()


def reconstruction_loss(x_ND: Tensor, reconstruction_ND: Tensor, n_tokens: int, data_variance: Tensor) -> Tensor:
    """This micro-batch's part of the step's FVU: Σ‖x - x̂‖² / (n_tokens · data_variance)."""
    return squared_error(x_ND, reconstruction_ND) / (n_tokens * data_variance)


def auxk_loss(
    residual_ND: Tensor, estimate_ND: Tensor, n_tokens: int, residual_variance: Tensor, dead_fraction: Tensor
) -> Tensor:
    """AuxK of Gao et al. (arXiv 2406.04093 §A.2): dead latents rebuild what the live ones leave.

    Σ‖e - ê‖² / (n_tokens · residual_variance), times min(dead / k_aux, 1). ``residual_ND`` is detached, and the
    decoder bias is in neither side. The residual variance is the previous step's, so that cutting a batch into
    micro-batches or ranks leaves the gradient alone.
    """
    tiny = torch.finfo(residual_ND.dtype).tiny
    return dead_fraction * squared_error(residual_ND, estimate_ND) / (n_tokens * residual_variance.clamp_min(tiny))


def cross_entropy(log_probs_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Σ over positions of -log q(target) in nats, a scalar; ``targets_N`` int64 token ids."""
    return -log_probs_NV.gather(1, targets_N.unsqueeze(1)).sum()


def kl_divergence(clean_log_probs_NV: Tensor, log_probs_NV: Tensor) -> Tensor:
    """Σ over positions of KL(p‖q) in nats, a scalar: p the log-probabilities ``clean_NV``, q ``log_probs_NV``.

    With its entropy term, so that it is zero where both agree.
    """
    return (clean_log_probs_NV.exp() * (clean_log_probs_NV - log_probs_NV)).sum()

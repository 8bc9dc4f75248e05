"""Figures of merit as pure functions of sums, codes and decoders; formulas in docs/metrics.md."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def total_variance(shifted_sum_D: Tensor, shifted_square: float, tokens: int) -> float:
    """Σ‖x - μ‖² from sums of x - c for any constant c: Σ‖x - c‖² - ‖Σ(x - c)‖² / T."""
    return shifted_square - float(shifted_sum_D.pow(2).sum()) / max(tokens, 1)


def fvu(residual_square: float, variance_total: float) -> float:
    """Fraction of variance unexplained, Σ‖x - x̂‖² / Σ‖x - μ‖² with μ over all tokens; nan without variance."""
    return residual_square / variance_total if variance_total > 0 else float("nan")


@torch.no_grad()
def top_decoder_cosines(W_dec_FD: Tensor, n: int = 100, block: int = 2048) -> Tensor:
    """The ``n`` largest cosines between two different rows, (min(n, pairs),), in blocks and never F x F."""
    rows = W_dec_FD / W_dec_FD.norm(dim=1, keepdim=True).clamp_min(1e-30)
    best = rows.new_full((0,), -1.0)
    for i in range(0, len(rows), block):
        for j in range(i, len(rows), block):
            cosines = rows[i : i + block] @ rows[j : j + block].T
            if i == j:
                cosines = cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)]
            flat = cosines.reshape(-1)
            best = torch.cat([best, flat.topk(min(n, len(flat)), sorted=False).values])
            best = best.topk(min(n, len(best))).values
    return best


def decoder_redundancy(W_dec_FD: Tensor, n: int = 100) -> float:
    """Mean of the ``n`` largest cosines between two latents' decoder rows; nan with a single latent."""
    cosines = top_decoder_cosines(W_dec_FD, n)
    return float(cosines.mean()) if len(cosines) else float("nan")


def random_redundancy(d_in: int, num_latents: int, n: int = 100) -> float:
    """What :func:`decoder_redundancy` expects of ``num_latents`` random directions in ``d_in`` dimensions.

    The cosine t of two random directions has density ∝ (1 - t²)^((d-3)/2). The mean of the n largest of M pairs is
    taken as the mean of its quantiles at 1 - (i - ½) / M.
    """
    pairs = num_latents * (num_latents - 1) // 2
    n = min(n, pairs)
    if n == 0 or d_in < 2:
        return float("nan")
    t = np.cos(np.linspace(np.pi, 0, 200_001))
    # With t = cos(angle) the density over the angle is sin^(d-2), which is finite in every dimension.
    density = np.exp((d_in - 2) * np.log(np.clip(np.sqrt(1 - t**2), 1e-300, None)))
    above = np.cumsum(density[::-1])[::-1] / density.sum()
    wanted = (np.arange(n) + 0.5) / pairs
    return float(np.interp(wanted, above[::-1], t[::-1]).mean())

"""Figures of merit as pure functions of sums, codes and decoders; formulas in docs/metrics.md."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def total_variance(shifted_sum: Tensor, shifted_square: Tensor, tokens: Tensor) -> Tensor:
    """Σ‖x - μ‖² (…) from sums of x - c for any constant c: Σ‖x - c‖² (…) - ‖Σ(x - c)‖² / T, of (…, D) and (…)."""
    return shifted_square - shifted_sum.pow(2).sum(dim=-1) / tokens


def fvu(residual_square: Tensor, variance_total: Tensor) -> Tensor:
    """Fraction of variance unexplained, Σ‖x - x̂‖² / Σ‖x - μ‖² with μ over all tokens; nan without variance."""
    return torch.where(variance_total > 0, residual_square / variance_total, torch.nan)


@torch.no_grad()
def decoder_cosines(W_dec_FD: Tensor, n: int = 100, block: int = 2048) -> tuple[Tensor, Tensor]:
    """Cosines between different rows, in blocks and never F x F.

    (the ``n`` largest of all pairs, (min(n, pairs),); each row's largest, (F,), -1 with a single row).
    """
    rows = W_dec_FD / W_dec_FD.norm(dim=1, keepdim=True).clamp_min(1e-30)
    best = rows.new_full((0,), -1.0)
    largest = rows.new_full((len(rows),), -1.0)
    for i in range(0, len(rows), block):
        for j in range(i, len(rows), block):
            cosines = rows[i : i + block] @ rows[j : j + block].T
            if i == j:
                cosines.fill_diagonal_(-1.0)
            for start, dim in ((i, 1), (j, 0)):
                part = largest[start : start + block]
                torch.maximum(part, cosines.amax(dim=dim), out=part)
            flat = cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)] if i == j else cosines.reshape(-1)
            best = torch.cat([best, flat.topk(min(n, len(flat)), sorted=False).values])
            best = best.topk(min(n, len(best))).values
    return best, largest


def top_decoder_cosines(W_dec_FD: Tensor, n: int = 100, block: int = 2048) -> Tensor:
    """The ``n`` largest cosines between two different rows, (min(n, pairs),)."""
    return decoder_cosines(W_dec_FD, n, block)[0]


def decoder_redundancy(W_dec_FD: Tensor, n: int = 100) -> float:
    """Mean of the ``n`` largest cosines between two latents' decoder rows; nan with a single latent."""
    cosines = top_decoder_cosines(W_dec_FD, n)
    return float(cosines.mean()) if len(cosines) else float("nan")


def random_redundancy(d_in: int, num_latents: int, n: int = 100) -> float:
    """What :func:`decoder_redundancy` expects of ``num_latents`` random directions in ``d_in`` dimensions.

    The mean of the n largest of M pairs is taken as the mean of their quantiles at 1 - (i - ½) / M.
    """
    pairs = num_latents * (num_latents - 1) // 2
    n = min(n, pairs)
    if n == 0 or d_in < 2:
        return float("nan")
    t, above = _random_cosine(d_in)
    wanted = (np.arange(n) + 0.5) / pairs
    return float(np.interp(wanted, above[::-1], t[::-1]).mean())


def random_max_cosine(d_in: int, num_latents: int) -> float:
    """Expected largest cosine of one of ``num_latents`` random directions in ``d_in`` dimensions with any other."""
    if num_latents < 2 or d_in < 2:
        return float("nan")
    t, above = _random_cosine(d_in)
    at_most = (1 - above) ** (num_latents - 1)
    return float(1 - np.trapezoid(at_most, t))


def _random_cosine(d_in: int) -> tuple[np.ndarray, np.ndarray]:
    """(t from -1 to 1, the chance that the cosine of two random directions exceeds it).

    Its density is ∝ (1 - t²)^((d-3)/2).
    """
    t = np.cos(np.linspace(np.pi, 0, 200_001))
    # With t = cos(angle) the density over the angle is sin^(d-2), which is finite in every dimension.
    density = np.exp((d_in - 2) * np.log(np.clip(np.sqrt(1 - t**2), 1e-300, None)))
    return t, np.cumsum(density[::-1])[::-1] / density.sum()

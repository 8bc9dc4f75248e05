"""Metrics as pure functions of sums and decoder weights; docs/metrics.md has the formulas."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor


def total_variance(shifted_sum: Tensor, shifted_square: Tensor, tokens: Tensor) -> Tensor:
    """Return Σ‖x - μ‖² (…) from sums of x - c, for any constant c.

    The formula is Σ‖x - c‖² - ‖Σ(x - c)‖² / T, with ``shifted_square`` (…), ``shifted_sum`` (…, D) and ``tokens`` T.
    """
    return shifted_square - shifted_sum.pow(2).sum(dim=-1) / tokens


def compute_fvu(residual_square_sum: Tensor, total_square: Tensor) -> Tensor:
    """Return the fraction of variance unexplained, Σ‖x - x̂‖² / Σ‖x - μ‖², with μ the mean over all tokens.

    The result is nan where the variance is zero.
    """
    return torch.where(total_square > 0, residual_square_sum / total_square, torch.nan)


@torch.no_grad()
def top_and_max_decoder_cosines(W_dec_FD: Tensor, n: int = 100, block_rows: int = 2048) -> tuple[Tensor, Tensor]:
    """Return the ``n`` largest cosines of all pairs of rows, (min(n, pairs),), and each row's largest cosine, (F,).

    The largest cosine of a single row is -1. The cosines are computed in blocks, so that no F x F matrix is stored.
    """
    rows = W_dec_FD / W_dec_FD.norm(dim=1, keepdim=True).clamp_min(1e-30)
    top = rows.new_full((0,), -1.0)
    row_max = rows.new_full((len(rows),), -1.0)
    for i in range(0, len(rows), block_rows):
        for j in range(i, len(rows), block_rows):
            cosines = rows[i : i + block_rows] @ rows[j : j + block_rows].T
            if i == j:
                cosines.fill_diagonal_(-1.0)
            for start, dim in ((i, 1), (j, 0)):
                part = row_max[start : start + block_rows]
                torch.maximum(part, cosines.amax(dim=dim), out=part)
            flat = cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)] if i == j else cosines.reshape(-1)
            top = torch.cat([top, flat.topk(min(n, len(flat)), sorted=False).values])
            top = top.topk(min(n, len(top))).values
    return top, row_max


def expected_random_redundancy(d_in: int, num_latents: int, n: int = 100) -> float:
    """Return the expected mean of the ``n`` largest cosines between two of ``num_latents`` random directions.

    ``d_in``: their width. The mean over M pairs is approximated by the mean of the quantiles at 1 - (i - ½) / M.
    """
    pairs = num_latents * (num_latents - 1) // 2
    n = min(n, pairs)
    if n == 0 or d_in < 2:
        return float("nan")
    t, survival = _random_cosine_survival(d_in)
    wanted = (np.arange(n) + 0.5) / pairs
    return float(np.interp(wanted, survival[::-1], t[::-1]).mean())


def expected_random_max_cosine(d_in: int, num_latents: int) -> float:
    """Return the expected largest cosine of one of ``num_latents`` random directions with the others."""
    if num_latents < 2 or d_in < 2:
        return float("nan")
    t, survival = _random_cosine_survival(d_in)
    max_cdf = (1 - survival) ** (num_latents - 1)
    return float(1 - np.trapezoid(max_cdf, t))


def expected_random_max_cosine_shares(d_in: int, num_latents: int, edges: np.ndarray) -> np.ndarray:
    """Return the expected shares of random directions whose largest cosine with the others is between two ``edges``."""
    if num_latents < 2 or d_in < 2:
        return np.zeros(len(edges) - 1)
    t, survival = _random_cosine_survival(d_in)
    return np.diff((1 - np.interp(edges, t, survival)) ** (num_latents - 1))


def expected_random_duplicates(d_in: int, num_latents: int, cosine: float) -> float:
    """Return the probability that one of ``num_latents`` random directions has another within ``cosine``."""
    if num_latents < 2 or d_in < 2:
        return float("nan")
    t, survival = _random_cosine_survival(d_in)
    return float(-np.expm1((num_latents - 1) * np.log1p(-np.interp(cosine, t, survival))))


@functools.lru_cache(maxsize=4)
def _random_cosine_survival(d_in: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (t from -1 to 1, probability that the cosine of two random directions exceeds t).

    The density of the cosine is proportional to (1 - t²)^((d-3)/2). Cached, because it takes 4 ms, and every evaluation
    of every SAE asks for it three times.
    """
    t = np.cos(np.linspace(np.pi, 0, 200_001))
    # The density over the angle, sin^(d-2), is finite in every dimension, unlike the density over the cosine t.
    density = np.exp((d_in - 2) * np.log(np.clip(np.sqrt(1 - t**2), 1e-300, None)))
    return t, np.cumsum(density[::-1])[::-1] / density.sum()

"""What a page shows of a decoder: its rows in two dimensions, and the cosine of each row with its nearest row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain.metrics import expected_random_max_cosine_shares

MAP_STEPS = 65535
MAX_SAMPLED_ROWS = 2048
"""Rows whose nearest row is searched; the cost grows with this number times F."""
BLOCK_ROWS = 256
COSINE_EDGES = np.linspace(0, 1, 51)


@torch.no_grad()
def project_decoder(W_dec_FD: Tensor) -> tuple[np.ndarray, list[float]]:
    """Return the first two principal components of the rows, (F, 2), and their shares of the rows' variance.

    The rows have unit norm and are centred. Coordinates are scaled to the range of uint16, equally in both directions.
    """
    rows_FD = _normalize_rows(W_dec_FD)
    rows_FD = rows_FD - rows_FD.mean(dim=0)
    n_components = min(2, *rows_FD.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Without oversampling, the second component of a flat spectrum is imprecise.
        _, singular, axes = torch.pca_lowrank(rows_FD, q=min(8, *rows_FD.shape), center=False, niter=4)
    shares = singular[:n_components].square() / rows_FD.square().sum().clamp_min(1e-30)
    points = np.zeros((len(rows_FD), 2))
    points[:, :n_components] = (rows_FD @ axes[:, :n_components]).numpy()
    largest = max(float(np.abs(points).max()), 1e-30)
    return np.rint((points / largest + 1) / 2 * MAP_STEPS).astype(np.int64), shares.tolist()


@torch.no_grad()
def summarize_nearest_cosines(W_dec_FD: Tensor) -> dict[str, Any]:
    """Return the histogram of each row's largest cosine with another row, next to that of random directions.

    Both are shares of latents per bin of COSINE_EDGES. At most MAX_SAMPLED_ROWS evenly spaced rows are measured.
    """
    rows_FD = _normalize_rows(W_dec_FD)
    n_latents, d_out = rows_FD.shape
    chosen = torch.linspace(0, n_latents - 1, min(n_latents, MAX_SAMPLED_ROWS)).round().long()
    largest = []
    for block in chosen.split(BLOCK_ROWS):
        cosines = rows_FD[block] @ rows_FD.T
        cosines[torch.arange(len(block)), block] = -1.0
        largest.append(cosines.amax(dim=1))
    counts, _ = np.histogram(torch.cat(largest).clamp(0, 1).numpy(), COSINE_EDGES)
    return {
        "edges": COSINE_EDGES.tolist(),
        "decoder": (counts / len(chosen)).tolist(),
        "random": expected_random_max_cosine_shares(d_out, n_latents, COSINE_EDGES).tolist(),
        "rows": len(chosen),
    }


def _normalize_rows(W_FD: Tensor) -> Tensor:
    rows = W_FD.float().cpu()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)

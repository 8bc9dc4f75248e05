"""FVU by token frequency: how well an SAE reconstructs the activations of frequent and of rare tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain.metrics import compute_fvu, total_variance

LOG10_FREQUENCY_EDGES = tuple(-6 + 0.5 * step for step in range(13))
"""Edges of the bins: log10 of the share of the text's tokens that are the same token."""


class TokenBins:
    """Bins of token ids by their share of a text."""

    def __init__(self, counts: np.ndarray) -> None:
        """``counts`` (V,): how often each token id occurs in the text."""
        with np.errstate(divide="ignore"):
            logs = np.log10(counts / max(counts.sum(), 1))
        # Rounding must not move a share of exactly 10^-3 into the bin below.
        found = np.searchsorted(np.array(LOG10_FREQUENCY_EDGES) - 1e-9, logs, side="right") - 1
        self._bins = found.clip(0, len(LOG10_FREQUENCY_EDGES) - 2)

    @classmethod
    def from_ids(cls, parts: Iterable[np.ndarray]) -> TokenBins:
        """Count the token ids of all ``parts`` of a text, each (N,)."""
        return cls(np.bincount(np.concatenate([np.empty(0, np.int32), *parts])))

    def find_bins(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of the bin of each token id, (N,)."""
        return np.asarray(self._bins[ids])


class FrequencySums:
    """Running sums over tokens in raw units, one set per bin.

    ``centre`` (D,) is any constant near the mean; subtracting it avoids cancellation in the variance.
    """

    def __init__(self, centre: Tensor) -> None:
        self._centre, n_bins = centre.double(), len(LOG10_FREQUENCY_EDGES) - 1
        zeros = torch.zeros(n_bins, dtype=torch.float64, device=centre.device)
        self._tokens, self._square, self._residual = zeros.clone(), zeros.clone(), zeros.clone()
        self._shift = torch.zeros(n_bins, len(centre), dtype=torch.float64, device=centre.device)

    def add(self, y_ND: Tensor, reconstruction_ND: Tensor, bins: np.ndarray) -> None:
        """Add activations and reconstructions (N, D), and the bin of each token, (N,)."""
        y, index = y_ND.double(), torch.from_numpy(bins).to(y_ND.device)
        shift = y - self._centre
        self._tokens.index_add_(0, index, torch.ones_like(shift[:, 0]))
        self._shift.index_add_(0, index, shift)
        self._square.index_add_(0, index, shift.square().sum(dim=1))
        self._residual.index_add_(0, index, (y - reconstruction_ND.double()).square().sum(dim=1))

    def as_json(self) -> dict[str, Any]:
        """Return ``edges_log10`` (E entries), and per bin ``tokens`` and ``fvu`` (E - 1 entries, nan if undefined).

        The variance of a bin is that around its own mean.
        """
        fvu = compute_fvu(self._residual, total_variance(self._shift, self._square, self._tokens))
        # Of a single token, the variance is zero up to rounding.
        fvu = torch.where(self._tokens > 1, fvu, torch.nan)
        return {
            "edges_log10": list(LOG10_FREQUENCY_EDGES),
            "tokens": self._tokens.long().tolist(),
            "fvu": fvu.tolist(),
        }

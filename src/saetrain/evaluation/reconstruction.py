"""Reconstruction metrics (FVU, cosine, norm ratio, …) from sums in fp64 that do not depend on the batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from saetrain.evaluation.bootstrap import (
    AT_MOST_ONE,
    COSINE_RANGE,
    NON_NEGATIVE,
    UNBOUNDED,
    DocumentSums,
    Estimate,
    Formula,
    Sums,
    ValueRange,
)
from saetrain.metrics import compute_fvu, total_variance


def _fvu_formula(sums: Sums) -> Tensor:
    return compute_fvu(sums["residual"], total_variance(sums["shift"], sums["square"], sums["tokens"]))


METRIC_FORMULAS: dict[str, Formula] = {
    "fvu": _fvu_formula,
    "explained_variance": lambda sums: 1 - _fvu_formula(sums),
    "mse": lambda sums: sums["residual"] / (sums["tokens"] * sums["shift"].shape[-1]),
    "cosine": lambda sums: sums["cosine"] / sums["tokens"],
    "norm_ratio": lambda sums: sums["norm_ratio"] / sums["tokens"],
    "reconstruction_bias": lambda sums: sums["norm_square"] / sums["inner"],
}
"""Formula of each metric; docs/metrics.md defines them."""
METRIC_RANGES: dict[str, ValueRange] = {
    "fvu": NON_NEGATIVE,
    "explained_variance": AT_MOST_ONE,
    "mse": NON_NEGATIVE,
    "cosine": COSINE_RANGE,
    "norm_ratio": NON_NEGATIVE,
}
"""Range of each metric that has one."""


class ReconstructionSums:
    """Running sums over tokens in raw units.

    ``centre`` (D,) is any constant near the mean; subtracting it avoids cancellation in the variance.
    """

    def __init__(self, centre: Tensor, replicates: int = 0, seed: int = 0) -> None:
        self._centre = centre.double()
        self._sums = DocumentSums(replicates, seed)
        self.n_tokens = 0

    @torch.no_grad()
    def add(self, y_ND: Tensor, reconstruction_ND: Tensor, docs: np.ndarray) -> None:
        """Add a batch: activations and reconstructions (N, D), and the document id of each token, (N,)."""
        if not len(y_ND):
            return
        y, y_hat = y_ND.double(), reconstruction_ND.double()
        shift = y - self._centre
        terms = {
            "tokens": torch.ones(len(y), device=y.device),
            "shift": shift,
            "square": shift.pow(2).sum(dim=1),
            "residual": (y - y_hat).pow(2).sum(dim=1),
            "cosine": torch.cosine_similarity(y, y_hat, dim=1),
            "norm_ratio": y_hat.norm(dim=1) / y.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny),
            "inner": (y * y_hat).sum(dim=1),
            "norm_square": y_hat.pow(2).sum(dim=1),
        }
        self._sums.add(docs, terms)
        self.n_tokens += len(y)

    @staticmethod
    def merge(parts: Sequence[ReconstructionSums]) -> ReconstructionSums:
        """Return the sums of ``parts`` with one centre together, without replicates."""
        merged = ReconstructionSums(parts[0]._centre)
        for part in parts:
            if part.n_tokens:
                merged._sums.add_document_sums(
                    np.zeros(1, dtype=np.int64),
                    {name: value.unsqueeze(0) for name, value in part._sums.full_sums.items()},
                )
                merged.n_tokens += part.n_tokens
        return merged

    def metric_estimates(self) -> dict[str, Estimate]:
        """Return each metric of ``METRIC_FORMULAS`` with its interval; nan if no token was added."""
        if not self.n_tokens:
            return dict.fromkeys(METRIC_FORMULAS, Estimate(float("nan")))
        return {
            name: self._sums.estimate_metric(formula, METRIC_RANGES.get(name, UNBOUNDED))
            for name, formula in METRIC_FORMULAS.items()
        }

    def metric_values(self) -> dict[str, float]:
        """Return the metrics without their intervals."""
        return {name: estimate.value for name, estimate in self.metric_estimates().items()}

"""How well x̂ rebuilds x: sums in fp64 that do not depend on how the tokens were batched."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from saetrain.evaluation.bootstrap import (
    ANY,
    AT_MOST_ONE,
    COSINE,
    NOT_NEGATIVE,
    DocumentSums,
    Estimate,
    Formula,
    Range,
    Sums,
)
from saetrain.metrics import compute_fvu, total_variance


def _fvu(sums: Sums) -> Tensor:
    return compute_fvu(sums["residual"], total_variance(sums["shift"], sums["square"], sums["tokens"]))


FORMULAS: dict[str, Formula] = {
    "fvu": _fvu,
    "explained_variance": lambda sums: 1 - _fvu(sums),
    "mse": lambda sums: sums["residual"] / (sums["tokens"] * sums["shift"].shape[-1]),
    "cosine": lambda sums: sums["cosine"] / sums["tokens"],
    "norm_ratio": lambda sums: sums["norm_ratio"] / sums["tokens"],
    "reconstruction_bias": lambda sums: sums["norm_square"] / sums["inner"],
}
"""Figure -> its formula; docs/metrics.md explains each."""
POSSIBLE: dict[str, Range] = {
    "fvu": NOT_NEGATIVE,
    "explained_variance": AT_MOST_ONE,
    "mse": NOT_NEGATIVE,
    "cosine": COSINE,
    "norm_ratio": NOT_NEGATIVE,
}
"""Figure -> its range, where it has one."""


class ReconstructionSums:
    """Running sums over tokens in raw units; ``centre`` (D,) is any constant near the mean, against cancellation."""

    def __init__(self, centre: Tensor, replicates: int = 0, seed: int = 0) -> None:
        self._centre = centre.double()
        self._sums = DocumentSums(replicates, seed)
        self.tokens = 0

    @torch.no_grad()
    def add(self, x_ND: Tensor, reconstruction_ND: Tensor, docs: np.ndarray | None = None) -> None:
        """Count a batch; ``docs`` (N,) says which document each token is from."""
        if not len(x_ND):
            return
        x, estimate = x_ND.double(), reconstruction_ND.double()
        shift = x - self._centre
        terms = {
            "tokens": torch.ones(len(x), device=x.device),
            "shift": shift,
            "square": shift.pow(2).sum(dim=1),
            "residual": (x - estimate).pow(2).sum(dim=1),
            "cosine": torch.cosine_similarity(x, estimate, dim=1),
            "norm_ratio": estimate.norm(dim=1) / x.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny),
            "inner": (x * estimate).sum(dim=1),
            "norm_square": estimate.pow(2).sum(dim=1),
        }
        self._sums.add(np.zeros(len(x), dtype=np.int64) if docs is None else docs, terms)
        self.tokens += len(x)

    def plus(self, others: list[ReconstructionSums]) -> ReconstructionSums:
        """The sums of this and ``others`` together, without replicates."""
        out = ReconstructionSums(self._centre)
        for part in (self, *others):
            if part.tokens:
                out._sums.add_documents(
                    np.zeros(1, dtype=np.int64), {name: value.unsqueeze(0) for name, value in part._sums.total.items()}
                )
                out.tokens += part.tokens
        return out

    def estimates(self) -> dict[str, Estimate]:
        """Each figure of FORMULAS with its interval; nan where no token was counted."""
        if not self.tokens:
            return dict.fromkeys(FORMULAS, Estimate(float("nan")))
        return {name: self._sums.estimate(formula, POSSIBLE.get(name, ANY)) for name, formula in FORMULAS.items()}

    def metrics(self) -> dict[str, float]:
        """The figures alone."""
        return {name: estimate.value for name, estimate in self.estimates().items()}

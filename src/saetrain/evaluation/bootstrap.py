"""Sums over tokens with a Poisson bootstrap over documents: intervals at flat memory, in one pass.

Every replicate gives each document a weight drawn from Poisson(1), seeded by the document alone, so that a figure and
its interval do not depend on how the text was batched (Hanley and MacGibbon 2006; Chamandy et al. 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saetrain.data.masking import mixed

COVERAGE = 0.95
Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)
SHARE: Range = (0.0, 1.0)
COSINE: Range = (-1.0, 1.0)
NOT_NEGATIVE: Range = (0.0, math.inf)
AT_MOST_ONE: Range = (-math.inf, 1.0)

Sums = Mapping[str, Tensor]
Formula = Callable[[Sums], Tensor]


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; ``low`` and ``high`` are nan where nothing was resampled."""

    value: float
    low: float = math.nan
    high: float = math.nan


def poisson_weights(docs: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """(replicates, documents) float64, each a draw from Poisson(1) that document, replicate and seed decide."""
    streams = mixed(np.arange(replicates, dtype=np.uint64) + np.uint64(seed) * np.uint64(1 << 20))
    drawn = mixed(docs.astype(np.uint64)[None, :] ^ streams[:, None])
    cumulative = np.cumsum([math.exp(-1) / math.factorial(count) for count in range(16)])
    return np.searchsorted(cumulative, drawn / 2.0**64).astype(np.float64)


class DocumentSums:
    """Named sums over tokens, and the same of every replicate.

    ``total`` {name: (…)} and ``replicate`` {name: (replicates, …)}, both in ``dtype``.
    """

    def __init__(self, replicates: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        self.replicates, self._seed, self._dtype = replicates, seed, dtype
        self.total: dict[str, Tensor] = {}
        self.replicate: dict[str, Tensor] = {}
        self._first: int | None = None
        self._several = False

    def add(self, docs: np.ndarray, terms: Mapping[str, Tensor]) -> None:
        """Count n tokens: ``docs`` (n,) int64, and each term's value for every one of them, (n, …)."""
        documents, document_of = np.unique(docs, return_inverse=True)
        number = torch.from_numpy(document_of)
        summed = {}
        for name, value in terms.items():
            value = value.to(self._dtype)
            zeros = value.new_zeros(len(documents), *value.shape[1:])
            summed[name] = zeros.index_add_(0, number.to(value.device), value)
        self.add_documents(documents, summed)

    def add_documents(self, documents: np.ndarray, sums: Mapping[str, Tensor]) -> None:
        """Count whole documents (u,) int64 by their own sums, each (u, …)."""
        if self._first is None and len(documents):
            self._first = int(documents[0])
        self._several = self._several or bool((documents != self._first).any())
        weights = torch.from_numpy(poisson_weights(documents, self.replicates, self._seed)).to(self._dtype)
        for name, value in sums.items():
            value = value.to(self._dtype)
            whole = value.sum(dim=0)
            self.total[name] = self.total[name] + whole if name in self.total else whole
            if self.replicates:
                drawn = torch.tensordot(weights.to(value.device), value, dims=1)
                self.replicate[name] = self.replicate[name].add_(drawn) if name in self.replicate else drawn

    def estimate(self, formula: Formula, possible: Range = ANY) -> Estimate:
        """What ``formula`` makes of the sums, (…) to scalar and with a leading axis of replicates alike.

        ``possible``: the range of such a figure. One document alone can't be resampled, so it gives no interval.
        """
        resampled = self.replicate and self._several
        return interval(formula(self.total), formula(self.replicate) if resampled else None, possible)


def interval(value: Tensor, replicates: Tensor | None, possible: Range = ANY) -> Estimate:
    """The middle COVERAGE of the replicates, moved so that their mean is the value.

    It ends where the ``possible`` range of the figure does, and always holds the value.

    A replicate holds about 63 % of the documents, which biases what depends on how many there are (a latent that never
    fires); the shift takes that out. Replicates that are not finite (a denominator of zero) leave no interval.
    """
    if replicates is None or len(replicates) < 2 or not bool(torch.isfinite(replicates).all()):
        return Estimate(float(value))
    shifted = replicates.double() - replicates.double().mean() + float(value)
    tail = (1 - COVERAGE) / 2
    low, high = torch.quantile(shifted, torch.tensor([tail, 1 - tail], dtype=torch.float64, device=shifted.device))
    least, most = possible
    return Estimate(float(value), min(max(float(low), least), float(value)), max(min(float(high), most), float(value)))

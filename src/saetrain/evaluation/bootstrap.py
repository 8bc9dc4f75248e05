"""Poisson bootstrap over documents (Hanley and MacGibbon 2006; Chamandy et al. 2012), in one pass over the tokens.

Each replicate gives each document a weight drawn from Poisson(1). The draw is seeded by the document, replicate and
seed alone, so a metric and its interval do not depend on the batches. Memory does not grow with the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.mlm_masking import mix_bits
from saetrain.atomic_io import replace_non_finite

INTERVAL_COVERAGE = 0.95
ValueRange = tuple[float, float]
UNBOUNDED: ValueRange = (-math.inf, math.inf)
FRACTION_RANGE: ValueRange = (0.0, 1.0)
COSINE_RANGE: ValueRange = (-1.0, 1.0)
NON_NEGATIVE: ValueRange = (0.0, math.inf)
AT_MOST_ONE: ValueRange = (-math.inf, 1.0)

Sums = Mapping[str, Tensor]
Formula = Callable[[Sums], Tensor]


@dataclass(frozen=True)
class Estimate:
    """A metric with its interval; ``low`` and ``high`` are nan if there is no interval."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def as_json(self) -> dict[str, Any]:
        """Return the three numbers for JSON, with null for those that are not finite."""
        return replace_non_finite(asdict(self))


def draw_poisson_weights(docs: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """Return draws from Poisson(1), (replicates, documents) float64, determined by document, replicate and seed."""
    streams = mix_bits(np.arange(replicates, dtype=np.uint64) + np.uint64(seed) * np.uint64(1 << 20))
    random_bits = mix_bits(docs.astype(np.uint64)[None, :] ^ streams[:, None])
    cumulative = np.cumsum([math.exp(-1) / math.factorial(count) for count in range(16)])
    return np.searchsorted(cumulative, random_bits / 2.0**64).astype(np.float64)


class DocumentSums:
    """Named sums over tokens, for the full text and for every replicate.

    ``full_sums`` {name: (…)} and ``replicate_sums`` {name: (replicates, …)} are both in ``dtype``.
    """

    def __init__(self, replicates: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        self.replicates, self._seed, self._dtype = replicates, seed, dtype
        self.full_sums: dict[str, Tensor] = {}
        self.replicate_sums: dict[str, Tensor] = {}
        self._first_doc: int | None = None
        self._has_several_docs = False

    def add(self, docs: np.ndarray, terms: Mapping[str, Tensor]) -> None:
        """Add N tokens: their document ids ``docs`` (N,) int64, and each term's value per token, (N, …)."""
        documents, document_of = np.unique(docs, return_inverse=True)
        doc_index = torch.from_numpy(document_of)
        document_sums = {}
        for name, value in terms.items():
            value = value.to(self._dtype)
            zeros = value.new_zeros(len(documents), *value.shape[1:])
            document_sums[name] = zeros.index_add_(0, doc_index.to(value.device), value)
        self.add_document_sums(documents, document_sums)

    def add_document_sums(self, documents: np.ndarray, sums: Mapping[str, Tensor]) -> None:
        """Add sums that are already per document: ids ``documents`` (U,) int64, and each sum (U, …)."""
        if self._first_doc is None and len(documents):
            self._first_doc = int(documents[0])
        self._has_several_docs = self._has_several_docs or bool((documents != self._first_doc).any())
        weights = torch.from_numpy(draw_poisson_weights(documents, self.replicates, self._seed)).to(self._dtype)
        for name, value in sums.items():
            value = value.to(self._dtype)
            full_sum = value.sum(dim=0)
            self.full_sums[name] = self.full_sums[name] + full_sum if name in self.full_sums else full_sum
            if self.replicates:
                resampled = torch.tensordot(weights.to(value.device), value, dims=1)
                self.replicate_sums[name] = (
                    self.replicate_sums[name].add_(resampled) if name in self.replicate_sums else resampled
                )

    def estimate_metric(self, formula: Formula, value_range: ValueRange = UNBOUNDED) -> Estimate:
        """Return ``formula`` of the sums, with its interval limited to ``value_range``.

        ``formula`` must also accept sums with a leading axis of replicates. There is no interval for a single
        document, because it can't be resampled.
        """
        can_resample = self.replicate_sums and self._has_several_docs
        return bootstrap_estimate(
            formula(self.full_sums), formula(self.replicate_sums) if can_resample else None, value_range
        )


def bootstrap_estimate(value: Tensor, replicates: Tensor | None, value_range: ValueRange = UNBOUNDED) -> Estimate:
    """Return ``value`` with the central ``INTERVAL_COVERAGE`` of ``replicates`` (R,), shifted so that their mean is it.

    The interval is limited to ``value_range`` and always contains the value.

    A replicate contains about 63 % of the documents. This biases metrics that depend on the number of documents, such
    as the share of latents that never fire; the shift removes the bias. There is no interval if a replicate is not
    finite, for example because its denominator is zero.
    """
    if replicates is None or len(replicates) < 2 or not bool(torch.isfinite(replicates).all()):
        return Estimate(float(value))
    shifted = replicates.double() - replicates.double().mean() + float(value)
    tail = (1 - INTERVAL_COVERAGE) / 2
    low, high = torch.quantile(shifted, torch.tensor([tail, 1 - tail], dtype=torch.float64, device=shifted.device))
    lower_bound, upper_bound = value_range
    return Estimate(
        float(value), min(max(float(low), lower_bound), float(value)), max(min(float(high), upper_bound), float(value))
    )

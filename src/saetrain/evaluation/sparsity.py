"""Sparsity metrics of the decoded code: L0, dead latents and firing densities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain.evaluation.bootstrap import FRACTION_RANGE, NON_NEGATIVE, DocumentSums, Estimate, Formula, Sums
from saetrain.types import Codes

DOCUMENTS_PER_BLOCK = 64
"""Documents whose counts are in memory at once; bounds the counts (documents, F)."""
LOG10_DENSITY_EDGES = tuple(-6 + 0.5 * step for step in range(13))
"""Edges of the density histogram: log10 of the share of tokens on which a latent fires."""


def _firing_rates(sums: Sums) -> Tensor:
    return sums["fired"] / sums["tokens"].unsqueeze(-1)


def _fraction_where(condition: Callable[[Tensor], Tensor]) -> Formula:
    def compute_fraction(sums: Sums) -> Tensor:
        rates = _firing_rates(sums)
        # A replicate without tokens has no rate, but a condition on nan is False instead of nan.
        return condition(rates).double().mean(dim=-1).where(sums["tokens"] > 0, torch.nan)

    return compute_fraction


class SparsitySums:
    """Running firing counts of the decoded codes.

    A latent that fires on a smaller share of the tokens than ``dead_threshold`` counts as dead.
    """

    def __init__(
        self, num_latents: int, dead_threshold: float, device: torch.device, replicates: int = 0, seed: int = 0
    ) -> None:
        self._num_latents, self._dead_threshold, self._replicates = num_latents, dead_threshold, replicates
        self._l0_counts = torch.zeros(num_latents + 1, dtype=torch.long, device=device)
        # The counts are integers, which fp32 represents exactly up to 16 million.
        self._sums = DocumentSums(replicates, seed, torch.float32)
        self._firing_counts = torch.zeros(num_latents, dtype=torch.long, device=device)
        self.n_tokens = 0

    def add(self, codes: Codes, docs: np.ndarray | None = None) -> None:
        """Add the codes of N tokens; ``docs`` (N,) contains their document ids, and is required with replicates."""
        count = codes.values.shape[0]
        if not count:
            return
        self._firing_counts += codes.firing_counts()
        self._l0_counts += torch.bincount(codes.l0_per_token(), minlength=len(self._l0_counts))
        self.n_tokens += count
        if self._replicates:
            assert docs is not None, "replicates need documents"
            self._add_replicates(codes, docs)

    def _add_replicates(self, codes: Codes, docs: np.ndarray) -> None:
        documents, document_of = np.unique(docs, return_inverse=True)
        lengths = torch.from_numpy(np.bincount(document_of))
        for start in range(0, len(documents), DOCUMENTS_PER_BLOCK):
            token_rows = np.flatnonzero((document_of >= start) & (document_of < start + DOCUMENTS_PER_BLOCK))
            block = documents[start : start + DOCUMENTS_PER_BLOCK]
            rows = torch.from_numpy(token_rows).to(codes.values.device)
            doc_indices = torch.from_numpy(document_of[token_rows] - start).to(rows.device)
            fired = self._firings_per_document(codes.select_tokens(rows), doc_indices, len(block))
            tokens = lengths[start : start + DOCUMENTS_PER_BLOCK].to(rows.device)
            self._sums.add_document_sums(block, {"fired": fired, "tokens": tokens})

    def _firings_per_document(self, codes: Codes, doc_indices: Tensor, n_documents: int) -> Tensor:
        """Return the number of tokens on which each latent fires in each document, (documents, F)."""
        if codes.indices is None:
            out = torch.zeros(n_documents, self._num_latents, device=doc_indices.device)
            return out.index_add_(0, doc_indices, (codes.values > 0).float())
        flat = (doc_indices.unsqueeze(1) * self._num_latents + codes.indices)[codes.values > 0]
        return torch.bincount(flat, minlength=n_documents * self._num_latents).view(n_documents, self._num_latents)

    def metric_formulas(self) -> dict[str, Formula]:
        """Return the formula of each metric."""
        return {
            "l0": lambda sums: sums["fired"].sum(dim=-1) / sums["tokens"],
            "dead_below_threshold": _fraction_where(lambda rates: rates < self._dead_threshold),
            "dead_never_fired": _fraction_where(lambda rates: rates == 0),
            "dead_below_1e-5": _fraction_where(lambda rates: rates < 1e-5),
            "alive": _fraction_where(lambda rates: rates > 0),
            "density_over_1_percent": _fraction_where(lambda rates: rates > 0.01),
            "density_over_10_percent": _fraction_where(lambda rates: rates > 0.1),
        }

    def metric_estimates(self) -> dict[str, Estimate]:
        """Return each metric of :meth:`metric_formulas` with its interval, and ``l0_share`` = L0 / F."""
        # The integer counts are exact for any number of tokens, fp32 sums are not.
        exact_sums = {
            "fired": self._firing_counts.double(),
            "tokens": torch.tensor(float(max(self.n_tokens, 1)), dtype=torch.float64),
        }
        self._sums.full_sums = exact_sums
        out = {
            name: self._sums.estimate_metric(formula, NON_NEGATIVE if name == "l0" else FRACTION_RANGE)
            for name, formula in self.metric_formulas().items()
        }
        l0 = out["l0"]
        out["l0_share"] = Estimate(*(value / self._num_latents for value in (l0.value, l0.low, l0.high)))
        return out

    def metric_values(self) -> dict[str, float]:
        """Return the metrics without their intervals, and the 5th, 50th and 95th percentile of L0 over tokens."""
        low, middle, high = self.l0_percentiles()
        values = {name: estimate.value for name, estimate in self.metric_estimates().items()}
        return {**values, "l0_p5": low, "l0_p50": middle, "l0_p95": high}

    def l0_percentiles(self) -> tuple[int, int, int]:
        """Return the 5th, 50th and 95th percentile of L0 over tokens."""
        low, middle, high = (self._l0_percentile(fraction) for fraction in (0.05, 0.5, 0.95))
        return low, middle, high

    def _l0_percentile(self, fraction: float) -> int:
        """Return the smallest L0 that at least ``fraction`` of the tokens do not exceed."""
        cumulative_counts = self._l0_counts.cumsum(0)
        return int((cumulative_counts < fraction * self.n_tokens).sum())

    def density_histogram(self) -> dict[str, Any]:
        """Return the histogram of latents over log10 of their firing density.

        ``edges_log10`` has E entries and ``counts`` has E - 1. ``rarer`` latents fire less often than the first edge,
        ``never`` latents do not fire at all.
        """
        rates = (self._firing_counts.double() / max(self.n_tokens, 1)).cpu().numpy()
        logs = np.log10(rates[rates > 0])
        counts, _ = np.histogram(logs, bins=np.array(LOG10_DENSITY_EDGES))
        return {
            "edges_log10": list(LOG10_DENSITY_EDGES),
            "counts": counts.tolist(),
            "rarer": int((logs < LOG10_DENSITY_EDGES[0]).sum()),
            "never": int((rates == 0).sum()),
        }

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
L0_PERCENTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95}
"""Shares of the tokens by the names of the percentiles of L0."""
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

    def add(self, codes: Codes, docs: np.ndarray) -> None:
        """Add the codes of N tokens; ``docs`` (N,) contains their document ids."""
        if not len(docs):
            return
        self._firing_counts += codes.firing_counts()
        self._l0_counts += torch.bincount(codes.l0_per_token(), minlength=len(self._l0_counts))
        self.n_tokens += len(docs)
        if self._replicates:
            self._add_replicates(codes, docs)

    def _add_replicates(self, codes: Codes, docs: np.ndarray) -> None:
        documents, document_of, lengths = np.unique(docs, return_inverse=True, return_counts=True)
        device, ends = self._firing_counts.device, np.cumsum(lengths)
        by_document = codes.select_tokens(torch.from_numpy(np.argsort(document_of, kind="stable")).to(device))
        for start in range(0, len(documents), DOCUMENTS_PER_BLOCK):
            block = slice(start, start + DOCUMENTS_PER_BLOCK)
            fired = [
                by_document.select_tokens(slice(end - length, end)).firing_counts()
                for end, length in zip(ends[block], lengths[block], strict=True)
            ]
            tokens = torch.from_numpy(lengths[block]).to(device)
            self._sums.add_document_sums(documents[block], {"fired": torch.stack(fired), "tokens": tokens})

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
            "tokens": self._firing_counts.new_tensor(max(self.n_tokens, 1)).double(),
        }
        self._sums.full_sums = exact_sums
        out = {
            name: self._sums.estimate_metric(formula, NON_NEGATIVE if name == "l0" else FRACTION_RANGE)
            for name, formula in self.metric_formulas().items()
        }
        l0 = out["l0"]
        out["l0_share"] = Estimate(*(value / self._num_latents for value in (l0.value, l0.low, l0.high)))
        return out

    def l0_percentiles(self) -> dict[str, int]:
        """Return for each of ``L0_PERCENTILES`` the smallest L0 that its share of the tokens does not exceed."""
        cumulative_counts = self._l0_counts.cumsum(0)
        return {name: int((cumulative_counts < share * self.n_tokens).sum()) for name, share in L0_PERCENTILES.items()}

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

"""How sparse the decoded code is, and which latents are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain.evaluation.bootstrap import NOT_NEGATIVE, SHARE, DocumentSums, Estimate, Formula, Sums
from saetrain.types import Codes

DOCUMENTS = 64
"""Documents whose counts are held at once, which bounds the (documents, F) counts."""
EDGES = tuple(-6 + 0.5 * step for step in range(13))
"""Edges of the density histogram, log10 of the share of tokens that a latent fires on."""


def _rates(sums: Sums) -> Tensor:
    return sums["fired"] / sums["tokens"].unsqueeze(-1)


def _share(condition: Callable[[Tensor], Tensor]) -> Formula:
    def share(sums: Sums) -> Tensor:
        rates = _rates(sums)
        # No rate is known of a replicate without tokens, whatever the condition says of nan.
        return condition(rates).double().mean(dim=-1).where(sums["tokens"] > 0, torch.nan)

    return share


class SparsitySums:
    """Running counts over tokens of the code that is decoded."""

    def __init__(
        self, num_latents: int, threshold: float, device: torch.device, replicates: int = 0, seed: int = 0
    ) -> None:
        self._latents, self._threshold, self._replicates = num_latents, threshold, replicates
        self._l0 = torch.zeros(num_latents + 1, dtype=torch.long, device=device)
        # Whole numbers, which fp32 holds exactly up to 16 million.
        self._sums = DocumentSums(replicates, seed, torch.float32)
        self._fired = torch.zeros(num_latents, dtype=torch.long, device=device)
        self.tokens = 0

    def add(self, codes: Codes, docs: np.ndarray | None = None) -> None:
        """Count a batch; ``docs`` (N,) says which document each token is from."""
        count = codes.values.shape[0]
        if not count:
            return
        self._fired += codes.firing_counts()
        self._l0 += torch.bincount(codes.l0_per_token(), minlength=len(self._l0))
        self.tokens += count
        if self._replicates:
            assert docs is not None, "replicates need documents"
            self._resample(codes, docs)

    def _resample(self, codes: Codes, docs: np.ndarray) -> None:
        documents, document_of = np.unique(docs, return_inverse=True)
        lengths = torch.from_numpy(np.bincount(document_of))
        for start in range(0, len(documents), DOCUMENTS):
            chosen = np.flatnonzero((document_of >= start) & (document_of < start + DOCUMENTS))
            part = documents[start : start + DOCUMENTS]
            rows = torch.from_numpy(chosen).to(codes.values.device)
            numbers = torch.from_numpy(document_of[chosen] - start).to(rows.device)
            fired = self._fired_by(codes.select_tokens(rows), numbers, len(part))
            tokens = lengths[start : start + DOCUMENTS].to(rows.device)
            self._sums.add_documents(part, {"fired": fired, "tokens": tokens})

    def _fired_by(self, codes: Codes, numbers: Tensor, documents: int) -> Tensor:
        """(documents, F) tokens of each document on which each latent fires."""
        if codes.indices is None:
            out = torch.zeros(documents, self._latents, device=numbers.device)
            return out.index_add_(0, numbers, (codes.values > 0).float())
        flat = (numbers.unsqueeze(1) * self._latents + codes.indices)[codes.values > 0]
        return torch.bincount(flat, minlength=documents * self._latents).view(documents, self._latents)

    def formulas(self) -> dict[str, Formula]:
        """Figure -> its formula."""
        return {
            "l0": lambda sums: sums["fired"].sum(dim=-1) / sums["tokens"],
            "dead_below_threshold": _share(lambda rates: rates < self._threshold),
            "dead_never_fired": _share(lambda rates: rates == 0),
            "dead_below_1e-5": _share(lambda rates: rates < 1e-5),
            "alive": _share(lambda rates: rates > 0),
            "density_over_1_percent": _share(lambda rates: rates > 0.01),
            "density_over_10_percent": _share(lambda rates: rates > 0.1),
        }

    def estimates(self) -> dict[str, Estimate]:
        """Each figure of :meth:`formulas` with its interval, and ``l0_share``, L0 / F."""
        # The counts themselves are exact at any number of tokens.
        exact = {"fired": self._fired.double(), "tokens": torch.tensor(float(max(self.tokens, 1)), dtype=torch.float64)}
        self._sums.total = exact
        out = {
            name: self._sums.estimate(formula, NOT_NEGATIVE if name == "l0" else SHARE)
            for name, formula in self.formulas().items()
        }
        l0 = out["l0"]
        out["l0_share"] = Estimate(*(value / self._latents for value in (l0.value, l0.low, l0.high)))
        return out

    def metrics(self) -> dict[str, float]:
        """The figures alone, with the 5th, 50th and 95th percentile of L0 over tokens."""
        low, middle, high = self.l0_percentiles()
        values = {name: estimate.value for name, estimate in self.estimates().items()}
        return {**values, "l0_p5": low, "l0_p50": middle, "l0_p95": high}

    def l0_percentiles(self) -> tuple[int, int, int]:
        """5th, 50th and 95th percentile over tokens."""
        low, middle, high = (self._l0_percentile(share) for share in (0.05, 0.5, 0.95))
        return low, middle, high

    def _l0_percentile(self, share: float) -> int:
        """Smallest L0 that at least ``share`` of the tokens do not exceed."""
        running = self._l0.cumsum(0)
        return int((running < share * self.tokens).sum())

    def histogram(self) -> dict[str, Any]:
        """Latents by log10 of their density: ``edges`` (E,), ``counts`` (E - 1,), and those that fall outside."""
        rates = (self._fired.double() / max(self.tokens, 1)).cpu().numpy()
        logs = np.log10(rates[rates > 0])
        counts, _ = np.histogram(logs, bins=np.array(EDGES))
        return {
            "edges_log10": list(EDGES),
            "counts": counts.tolist(),
            "rarer": int((logs < EDGES[0]).sum()),
            "never": int((rates == 0).sum()),
        }

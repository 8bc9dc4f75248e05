"""How sparse the decoded code is, and which latents are used."""

from __future__ import annotations

import torch

from saetrain.types import Codes


class SparsitySums:
    """Running counts over tokens of the code that is decoded."""

    def __init__(self, num_latents: int, threshold: float, device: torch.device) -> None:
        self._threshold = threshold
        self._fired = torch.zeros(num_latents, dtype=torch.long, device=device)
        self._l0 = torch.zeros(num_latents + 1, dtype=torch.long, device=device)
        self.tokens = 0

    def add(self, codes: Codes) -> None:
        """Count a batch."""
        self._fired += codes.fired()
        self._l0 += torch.bincount(codes.l0(), minlength=len(self._l0))
        self.tokens += codes.values.shape[0]

    def metrics(self) -> dict[str, float]:
        """``l0`` (mean) with 5th, 50th and 95th percentile, and dead shares by rate and by never firing."""
        low, middle, high = (self._l0_percentile(share) for share in (0.05, 0.5, 0.95))
        rates = self._fired / max(self.tokens, 1)
        return {
            "l0": float(self._fired.sum()) / max(self.tokens, 1),
            "l0_p5": low,
            "l0_p50": middle,
            "l0_p95": high,
            "dead_below_threshold": int((rates < self._threshold).sum()) / len(rates),
            "dead_never_fired": int((self._fired == 0).sum()) / len(rates),
        }

    def _l0_percentile(self, share: float) -> int:
        """Smallest L0 that at least ``share`` of the tokens do not exceed."""
        running = self._l0.cumsum(0)
        return int((running < share * self.tokens).sum())

"""How well x̂ rebuilds x: sums in fp64 that do not depend on how the tokens were batched."""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.metrics import fvu, total_variance


class ReconstructionSums:
    """Running sums over tokens in raw units; ``centre`` (D,) is any constant near the mean, against cancellation."""

    def __init__(self, centre: Tensor) -> None:
        self._centre = centre.double()
        self._sum = torch.zeros_like(self._centre)
        self._square = self._residual = self._cosine = self._inner = self._norm_square = 0.0
        self.tokens = 0

    @torch.no_grad()
    def add(self, x_ND: Tensor, reconstruction_ND: Tensor) -> None:
        """Count a batch."""
        x, estimate = x_ND.double(), reconstruction_ND.double()
        shifted = x - self._centre
        self._sum += shifted.sum(dim=0)
        self._square += float(shifted.pow(2).sum())
        self._residual += float((x - estimate).pow(2).sum())
        self._cosine += float(torch.cosine_similarity(x, estimate, dim=1).sum())
        self._inner += float((x * estimate).sum())
        self._norm_square += float(estimate.pow(2).sum())
        self.tokens += len(x)

    def metrics(self) -> dict[str, float]:
        """``fvu``, ``explained_variance`` (1 - fvu), ``mse`` per element, ``cosine``, ``reconstruction_bias``."""
        unexplained = fvu(self._residual, total_variance(self._sum, self._square, self.tokens))
        return {
            "fvu": unexplained,
            "explained_variance": 1 - unexplained,
            "mse": self._residual / max(self.tokens * len(self._sum), 1),
            "cosine": self._cosine / max(self.tokens, 1),
            "reconstruction_bias": self._norm_square / self._inner if self._inner else float("nan"),
        }

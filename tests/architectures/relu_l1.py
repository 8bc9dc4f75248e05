"""ReLU SAE with an L1 penalty and free decoder norms (Bricken et al. 2023; the penalty is weighted by these norms)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saetrain.coders import CoderSettings, SparseCoder
from saetrain.types import Codes, Encoded, StepContext


@dataclass(frozen=True, kw_only=True)
class ReluL1Settings(CoderSettings):
    """SAE: size and sparsity."""

    l1_coefficient: float = 0.05
    """Weight of the L1 penalty."""


class ReluL1(SparseCoder):
    """f = ReLU(W_enc (x - b_dec) + b_enc), with the loss FVU + coefficient · mean Σ f ‖W_dec‖ / √variance."""

    Settings = ReluL1Settings
    has_unit_norm_decoder = False
    updates_idle_latents = True
    lifts_dead_biases = False

    def __init__(self, d_in: int, num_latents: int, l1_coefficient: float, seed: int, d_out: int | None) -> None:
        super().__init__(d_in, num_latents, seed, d_out)
        self.l1_coefficient = l1_coefficient

    @classmethod
    def build(cls, settings: Any, d_in: int, d_out: int | None = None, *, seed: int = 0) -> ReluL1:
        return cls(d_in, settings.resolve_num_latents(d_in), settings.l1_coefficient, seed, d_out)

    def encode(self, x_ND: Tensor) -> Codes:
        return Codes(torch.relu(self.pre_activations(x_ND)), None, self.num_latents)

    def losses(self, y_ND: Tensor, encoded: Encoded, y_hat_ND: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        penalty = (encoded.codes.values @ self.W_dec.norm(dim=1)).sum() / (ctx.n_tokens * ctx.data_variance.sqrt())
        return {**super().losses(y_ND, encoded, y_hat_ND, ctx), "l1": self.l1_coefficient * penalty}

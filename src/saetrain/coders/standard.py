"""ReLU SAE with an L1 penalty: Bricken et al. 2023, with the decoder norms of the April 2024 update (Anthropic)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saetrain.coders.base import SparseCoder
from saetrain.coders.l0_control import scale_coefficient_, sum_l0
from saetrain.types import Codes, Encoded, StepContext

FIRST_COEFFICIENT = 0.001
"""Initial weight of the penalty; half of the latents fire then, and the control raises it (a warm-up)."""


class Standard(SparseCoder):
    """Standard coder: f = ReLU(W_enc (x - b_dec) + b_enc), x̂ = W_dec f + b_dec, with free decoder norms.

    Loss: FVU + c · mean over tokens of Σ_i f_i ‖W_dec[i]‖ / √variance. The norms make the penalty independent of the
    scale of a latent. The coefficient c, a buffer, is controlled so that the mean L0 becomes k.
    """

    has_unit_norm_decoder = False
    lr_scale = 1.0
    latents_compete = False
    recorded_settings = ("k",)
    training_buffers = frozenset({"l1_coefficient"})
    l1_coefficient: Tensor

    def __init__(self, d_in: int, num_latents: int, k: int, seed: int = 0, d_out: int | None = None) -> None:
        super().__init__(d_in, num_latents, seed, d_out)
        self.k = k
        self.register_buffer("l1_coefficient", torch.tensor(FIRST_COEFFICIENT))

    @classmethod
    def build(cls, settings: Any, d_in: int, d_out: int | None = None, *, seed: int = 0) -> Standard:
        """Return a coder with initial weights."""
        return cls(d_in, settings.resolve_num_latents(d_in), settings.k, seed, d_out)

    def encode(self, x_ND: Tensor) -> Codes:
        """Return the dense code."""
        return Codes(self.pre_activations(x_ND).float().relu(), None, self.num_latents)

    def encode_train(self, x_ND: Tensor, ctx: StepContext) -> Encoded:
        """Return the dense code, and its L0 for the control of the coefficient."""
        codes = self.encode(x_ND)
        return Encoded(codes, sums=sum_l0(codes.l0_per_token()))

    def losses(self, y_ND: Tensor, encoded: Encoded, y_hat_ND: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """Return ``recon`` (the FVU) and ``l1``."""
        weighted = (encoded.codes.values.sum(dim=0) * self.W_dec.norm(dim=1)).sum()
        l1 = self.l1_coefficient * weighted / (ctx.n_tokens * ctx.data_variance.sqrt())
        return {**super().losses(y_ND, encoded, y_hat_ND, ctx), "l1": l1}

    def after_step(self, sums: Mapping[str, Tensor], ctx: StepContext) -> None:
        """Change the coefficient so that the L0 moves towards k."""
        scale_coefficient_(self.l1_coefficient, sums, self.k)

    def expected_l0(self) -> int | None:
        """Return k, to which the L0 is controlled; None if the SAE's file does not have it."""
        return self.k

"""Gated SAE, which is read and evaluated but not trained: Rajamanoharan et al., arXiv 2404.16014."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from saetrain.coders.base import SparseCoder
from saetrain.types import Codes


class Gated(SparseCoder):
    """Gated coder: p = W_enc (x - b_dec), f = 1[p + b_enc > 0] · ReLU(exp(r_mag) p + b_mag), x̂ = W_dec f + b_dec.

    ``b_enc`` (F,) is the bias of the gate. ``r_mag`` and ``b_mag``, both (F,), scale and shift the magnitude. The gate
    has no gradient, and the loss that trains it is not part of saetrain.
    """

    latents_compete = False
    encoder_parameters: ClassVar[frozenset[str]] = SparseCoder.encoder_parameters | {"r_mag", "b_mag"}
    latent_dims: ClassVar[Mapping[str, int]] = {**SparseCoder.latent_dims, "r_mag": 0, "b_mag": 0}

    def __init__(self, d_in: int, num_latents: int, seed: int = 0, d_out: int | None = None) -> None:
        super().__init__(d_in, num_latents, seed, d_out)
        self.r_mag = nn.Parameter(torch.zeros(num_latents))
        self.b_mag = nn.Parameter(torch.zeros(num_latents))

    def encode(self, x_ND: Tensor) -> Codes:
        """Return the dense code."""
        product_NF = self.centre(x_ND) @ self.W_enc
        magnitude_NF = (self.r_mag.exp() * product_NF + self.b_mag).relu()
        values_NF = torch.where(product_NF + self.b_enc > 0, magnitude_NF, 0)
        return Codes(values_NF.float(), None, self.num_latents)

    @torch.no_grad()
    def scale_code_units_(self, factor: float | Tensor) -> None:
        """Multiply the biases of gate and magnitude."""
        super().scale_code_units_(factor)
        self.b_mag.mul_(factor)

    @torch.no_grad()
    def shift_pre_activations_(self, shift_F: Tensor) -> None:
        """Add the shift to the bias of the gate, and its multiple to that of the magnitude."""
        super().shift_pre_activations_(shift_F)
        self.b_mag.add_(self.r_mag.exp() * shift_F)

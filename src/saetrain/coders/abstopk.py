"""AbsTopK SAE: latents with a sign, arXiv 2510.00404."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saetrain.coders.base import SparseCoder
from saetrain.types import Codes


class AbsTopK(SparseCoder):
    """AbsTopK coder: f = the k entries of W_enc (x - b_dec) + b_enc with the largest absolute values, with their sign.

    One latent represents a direction and its opposite. Readers of the code must test for values that are not zero.
    """

    saved_settings = ("k",)
    lr_scale = 1.0

    def __init__(self, d_in: int, num_latents: int, k: int, seed: int = 0, d_out: int | None = None) -> None:
        super().__init__(d_in, num_latents, seed, d_out)
        assert 1 <= k <= num_latents, (k, num_latents)
        self.k = k

    @classmethod
    def build(cls, settings: Any, d_in: int, d_out: int | None = None, *, seed: int = 0) -> AbsTopK:
        """Return a coder with initial weights."""
        return cls(d_in, settings.resolve_num_latents(d_in), settings.k, seed, d_out)

    def encode(self, x_ND: Tensor) -> Codes:
        """Return the k pre-activations of each row with the largest absolute values."""
        pre_NF = self.pre_activations(x_ND)
        indices = pre_NF.detach().abs().topk(self.k, dim=1, sorted=False).indices
        return Codes(pre_NF.gather(1, indices), indices, self.num_latents)

    def expected_l0(self) -> int:
        """Return k."""
        return self.k

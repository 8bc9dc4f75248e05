"""AbsTopK SAE: keeps the k pre-activations that are largest in absolute value, with their sign."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saetrain.coders import SparseCoder
from saetrain.types import Codes


class AbsTopK(SparseCoder):
    """f = the k largest |W_enc (x - b_dec) + b_enc| of each token."""

    lifts_dead_biases = False
    saved_settings = ("k",)

    def __init__(self, d_in: int, num_latents: int, k: int, seed: int, d_out: int | None) -> None:
        super().__init__(d_in, num_latents, seed, d_out)
        self.k = k

    @classmethod
    def build(cls, settings: Any, d_in: int, d_out: int | None = None, *, seed: int = 0) -> AbsTopK:
        return cls(d_in, settings.resolve_num_latents(d_in), settings.k, seed, d_out)

    def encode(self, x_ND: Tensor) -> Codes:
        pre = self.pre_activations(x_ND)
        indices = pre.abs().topk(self.k, dim=1, sorted=False).indices
        return Codes(pre.gather(1, indices), indices, self.num_latents)

    def expected_l0(self) -> int:
        return self.k

"""TopK SAE with the AuxK loss: Gao et al., Scaling and evaluating sparse autoencoders, arXiv 2406.04093."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saetrain.coders.auxk import AuxKCoder, AuxKSettings
from saetrain.losses import reconstruction_loss
from saetrain.ops import linear_topk
from saetrain.types import Codes, Encoded, StepContext

MULTI_FACTOR, MULTI_WEIGHT = 4, 1 / 8
"""Multi-TopK: multiple of k of the second reconstruction, and the weight of its FVU (Gao et al.)."""


@dataclass(frozen=True, kw_only=True)
class TopKSettings(AuxKSettings):
    """SAE: size and sparsity."""

    multi_topk: bool = False
    """Add 1/8 of the FVU of the reconstruction from 4k latents, so that the SAE also serves at a larger k."""


class TopK(AuxKCoder):
    """TopK coder: f = ReLU(TopK(W_enc (x - b_dec) + b_enc)), x̂ = W_dec f + b_dec.

    Multi-TopK (Gao et al. §5.3): the loss is L(k) + L(4k) / 8, where L(n) is the FVU of the reconstruction from the n
    largest pre-activations.
    """

    Settings = TopKSettings
    lr_scale = 1.0
    saved_settings = ("k",)

    def __init__(
        self,
        d_in: int,
        num_latents: int,
        k: int,
        auxk_alpha: float = 0.0,
        seed: int = 0,
        d_out: int | None = None,
        *,
        multi_topk: bool = False,
    ) -> None:
        super().__init__(d_in, num_latents, seed, d_out)
        assert 1 <= k <= num_latents, (k, num_latents)
        self.k, self.auxk_alpha, self.multi_topk = k, auxk_alpha, multi_topk

    @classmethod
    def build(cls, settings: Any, d_in: int, d_out: int | None = None, *, seed: int = 0) -> TopK:
        """Return a coder with initial weights."""
        num_latents, multi_topk = settings.resolve_num_latents(d_in), settings.multi_topk
        return cls(d_in, num_latents, settings.k, settings.auxk_alpha, seed, d_out, multi_topk=multi_topk)

    def encode(self, x_ND: Tensor) -> Codes:
        """Return the k largest pre-activations of each row; negative ones become zero."""
        return self._encode_largest(x_ND, self.k)

    def _encode_largest(self, x_ND: Tensor, k: int) -> Codes:
        assert x_ND.dim() == 2, tuple(x_ND.shape)
        assert x_ND.shape[1] == self.d_in, tuple(x_ND.shape)
        return linear_topk(x_ND, self.W_enc.T, self.b_enc, k, self.b_dec if self.is_sae else None)

    def encode_train(self, x_ND: Tensor, ctx: StepContext) -> Encoded:
        """Return the code of :meth:`encode`, and the input, which AuxK encodes with the dead latents.

        With ``multi_topk`` also ``values`` and ``indices`` of the code of 4k latents, which contains the other.
        """
        if not self.multi_topk:
            return Encoded(self.encode(x_ND), {"x": x_ND})
        wide = self._encode_largest(x_ND, min(MULTI_FACTOR * self.k, self.num_latents))
        assert wide.indices is not None
        position_NK = wide.values.detach().topk(self.k, dim=1, sorted=False).indices
        codes = Codes(wide.values.gather(1, position_NK), wide.indices.gather(1, position_NK), self.num_latents)
        return Encoded(codes, {"x": x_ND, "values": wide.values, "indices": wide.indices})

    def losses(self, y_ND: Tensor, encoded: Encoded, y_hat_ND: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """Return the terms of AuxK coders and, with ``multi_topk``, that of the reconstruction from 4k latents."""
        terms = super().losses(y_ND, encoded, y_hat_ND, ctx)
        if self.multi_topk:
            extras = encoded.extras
            y_wide_ND = self.decode(Codes(extras["values"], extras["indices"], self.num_latents))
            wide = reconstruction_loss(y_ND, y_wide_ND, ctx.n_tokens, ctx.data_variance)
            terms["multi_topk"] = MULTI_WEIGHT * wide
        return terms

    def expected_l0(self) -> int:
        """Return k."""
        return self.k

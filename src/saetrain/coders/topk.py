"""TopK SAE with the AuxK loss: Gao et al., Scaling and evaluating sparse autoencoders, arXiv 2406.04093."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saetrain.coders.base import CoderSettings, SparseCoder
from saetrain.errors import SaetrainError
from saetrain.losses import squared_error
from saetrain.ops import decode_codes, explicit_auxk, linear_topk, uses_plain_products
from saetrain.optim import RunSize, recommended_lr
from saetrain.types import Codes, Encoded, StepContext


@dataclass(frozen=True, kw_only=True)
class TopKSettings(CoderSettings):
    """SAE: size and sparsity."""

    auxk_alpha: float = 0.0
    """Weight of the AuxK loss, which trains dead latents to reconstruct the residual (Gao et al.: 0.03125)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.auxk_alpha < 0:
            raise SaetrainError(f"--auxk_alpha {self.auxk_alpha}: must not be negative")


def default_k_aux(d_in: int) -> int:
    """Return the number of dead latents that AuxK uses per token: a power of two near d_in / 2 (Gao et al. §A.2)."""
    return int(2 ** round(math.log2(max(d_in / 2, 1.0))))


class TopK(SparseCoder):
    """TopK coder: f = ReLU(TopK(W_enc (x - b_dec) + b_enc)), x̂ = W_dec f + b_dec."""

    Settings = TopKSettings
    saved_settings = ("k",)

    def __init__(
        self, d_in: int, num_latents: int, k: int, auxk_alpha: float = 0.0, seed: int = 0, d_out: int | None = None
    ) -> None:
        super().__init__(d_in, num_latents, seed, d_out)
        assert 1 <= k <= num_latents, (k, num_latents)
        self.k, self.auxk_alpha = k, auxk_alpha

    @classmethod
    def build(cls, settings: Any, d_in: int, d_out: int | None = None, *, seed: int = 0) -> TopK:
        """Return a coder with initial weights."""
        return cls(d_in, settings.resolve_num_latents(d_in), settings.k, settings.auxk_alpha, seed, d_out)

    def encode(self, x_ND: Tensor) -> Codes:
        """Return the k largest pre-activations of each row; negative ones become zero."""
        assert x_ND.dim() == 2, tuple(x_ND.shape)
        assert x_ND.shape[1] == self.d_in, tuple(x_ND.shape)
        return linear_topk(x_ND, self.W_enc.T, self.b_enc, self.k, self.b_dec if self.is_sae else None)

    def losses(self, y_ND: Tensor, encoded: Encoded, y_hat_ND: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """Return ``recon`` (the FVU) and, if a latent is dead and ``auxk_alpha`` is not 0, ``auxk``."""
        terms = super().losses(y_ND, encoded, y_hat_ND, ctx)
        if self.auxk_alpha and ctx.dead_mask is not None:
            residual = (y_ND - y_hat_ND).detach()
            terms["auxk"] = self._compute_auxk_loss(encoded.extras["x"], residual, ctx.dead_mask, ctx)
        return terms

    def encode_train(self, x_ND: Tensor, ctx: StepContext) -> Encoded:
        """Return the code of :meth:`encode`, and the input, which AuxK encodes with the dead latents."""
        return Encoded(self.encode(x_ND), {"x": x_ND})

    def _compute_auxk_loss(self, x_ND: Tensor, residual_ND: Tensor, dead: Tensor, ctx: StepContext) -> Tensor:
        """Return the weighted AuxK loss; its gradient reaches ``W_enc``, ``b_enc`` and ``W_dec``, but not ``b_dec``."""
        rows = dead.nonzero().squeeze(1)
        k, weight = min(default_k_aux(self.d_in), len(rows)), self.auxk_weight(len(rows), ctx)
        encoder, bias, decoder = self.W_enc.T[rows], self.b_enc[rows], self.W_dec[rows]
        centred = self.centre(x_ND).detach()
        if not uses_plain_products():
            return explicit_auxk(centred, residual_ND, encoder, bias, decoder, k=k, weight=weight)
        return weight * squared_error(residual_ND, decode_codes(linear_topk(centred, encoder, bias, k), decoder))

    def auxk_weight(self, n_dead: int | Tensor, ctx: StepContext) -> Tensor:
        """Return the factor of Σ‖e - ê‖² in the AuxK loss of Gao et al. (§A.2), weighted by ``auxk_alpha``.

        The loss is the mean per token, relative to the residual variance, times min(dead latents / k_aux, 1). The
        residual variance is that of the previous step, so that the gradient does not depend on micro-batches or ranks.
        """
        share = n_dead / default_k_aux(self.d_in)
        share = share.clamp_max(1.0) if isinstance(share, Tensor) else min(share, 1.0)
        tiny = torch.finfo(torch.float32).tiny
        return self.auxk_alpha * share / ctx.n_tokens / ctx.residual_variance.clamp_min(tiny)

    @property
    def uses_dead_latents(self) -> bool:
        """Whether AuxK is enabled."""
        return self.auxk_alpha > 0

    @property
    def dead_latents_advice(self) -> str | None:
        """Advice to enable AuxK, unless it is enabled."""
        return None if self.auxk_alpha else "pass --auxk_alpha 0.03125 to revive them"

    def expected_l0(self) -> int:
        """Return k."""
        return self.k

    def recommended_lr(self, tokens_per_step: int, steps: int) -> float:
        """Return the learning rate of the rule in docs/recipe.md."""
        return recommended_lr(RunSize(self.num_latents, self.k, tokens_per_step, steps))

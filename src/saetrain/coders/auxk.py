"""AuxK loss, in which dead latents reconstruct the residual: Gao et al., arXiv 2406.04093, §A.2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.coders.base import CoderSettings, SparseCoder
from saetrain.losses import squared_error
from saetrain.ops import decode_codes, explicit_auxk, linear_topk, uses_plain_products
from saetrain.settings import Factor
from saetrain.types import Encoded, StepContext


@dataclass(frozen=True, kw_only=True)
class AuxKSettings(CoderSettings):
    """SAE: size and sparsity."""

    auxk_alpha: Factor = 0.0
    """Weight of the AuxK loss, which trains dead latents to reconstruct the residual (Gao et al.: 0.03125)."""


def default_k_aux(d_in: int) -> int:
    """Return the number of dead latents that AuxK uses per token: a power of two near d_in / 2 (Gao et al. §A.2)."""
    return int(2 ** round(math.log2(max(d_in / 2, 1.0))))


class AuxKCoder(SparseCoder):
    """Coder with the AuxK loss; its ``encode_train`` returns its input as the extra ``x``."""

    Settings = AuxKSettings
    auxk_alpha: float

    def losses(self, y_ND: Tensor, encoded: Encoded, y_hat_ND: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """Return ``recon`` (the FVU) and, if a latent is dead and ``auxk_alpha`` is not 0, ``auxk``."""
        terms = super().losses(y_ND, encoded, y_hat_ND, ctx)
        if self.auxk_alpha and ctx.dead_mask is not None:
            residual = (y_ND - y_hat_ND).detach()
            terms["auxk"] = self._compute_auxk_loss(encoded.extras["x"], residual, ctx.dead_mask, ctx)
        return terms

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

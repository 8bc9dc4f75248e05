"""TopK SAE with the AuxK loss: Gao et al., Scaling and evaluating sparse autoencoders, arXiv 2406.04093."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from saetrain.coders.base import SparseCoder
from saetrain.errors import SaetrainError
from saetrain.losses import auxk_loss, reconstruction_loss
from saetrain.ops import sparse_decode, topk_relu
from saetrain.types import CoderOutput, Codes, StepContext, shown_default


@dataclass(frozen=True, kw_only=True)
class TopKSettings:
    """SAE: size and sparsity."""

    k: int = 192
    """Active latents per token."""
    expansion_factor: int = 32
    """Number of latents per activation dimension."""
    num_latents: Annotated[int | None, shown_default("width x expansion_factor", "INT")] = None
    """Number of latents, instead of --expansion_factor."""
    auxk_alpha: float = 0.0
    """Weight of the AuxK loss, which trains dead latents to reconstruct the residual (Gao et al.: 0.03125)."""

    def __post_init__(self) -> None:
        for name in ("k", "expansion_factor", "num_latents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SaetrainError(f"--{name} {value}: must be at least 1")
        if self.auxk_alpha < 0:
            raise SaetrainError(f"--auxk_alpha {self.auxk_alpha}: must not be negative")

    def resolve_num_latents(self, d_in: int) -> int:
        """Return the number of latents for activations of width ``d_in``; raises SaetrainError if k is larger."""
        num_latents = self.num_latents or d_in * self.expansion_factor
        if self.k > num_latents:
            raise SaetrainError(f"--k {self.k}: more than the {num_latents} latents")
        return num_latents


def default_k_aux(d_in: int) -> int:
    """Return the number of dead latents that AuxK uses per token: a power of two near d_in / 2 (Gao et al. §A.2)."""
    return int(2 ** round(math.log2(max(d_in / 2, 1.0))))


class TopK(SparseCoder):
    """TopK coder: f = ReLU(TopK(W_enc (x - b_dec) + b_enc)), x̂ = W_dec f + b_dec."""

    Settings = TopKSettings
    saved_settings = ("k",)

    def __init__(self, d_in: int, num_latents: int, k: int, auxk_alpha: float = 0.0, seed: int = 0) -> None:
        super().__init__(d_in, num_latents, seed)
        assert 1 <= k <= num_latents, (k, num_latents)
        self.k, self.auxk_alpha = k, auxk_alpha

    @classmethod
    def build(cls, settings: TopKSettings, d_in: int, d_out: int, *, seed: int = 0) -> TopK:
        """Return a coder with initial weights; SaetrainError if k is larger than the number of latents."""
        assert d_out == d_in, (d_in, d_out)
        return cls(d_in, settings.resolve_num_latents(d_in), settings.k, settings.auxk_alpha, seed)

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], k: int) -> TopK:
        """Return a coder that shares the memory of ``weights`` ({parameter name: tensor})."""
        coder = cls(1, k, k)
        coder.num_latents, coder.d_in = weights["W_dec"].shape
        for name, value in weights.items():
            setattr(coder, name, torch.nn.Parameter(value.detach(), requires_grad=False))
        return coder

    def encode(self, x_ND: Tensor) -> Codes:
        """Return the k largest pre-activations of each row; negative ones become zero."""
        assert x_ND.dim() == 2, tuple(x_ND.shape)
        assert x_ND.shape[1] == self.d_in, tuple(x_ND.shape)
        pre_NF = torch.addmm(self.b_enc, x_ND - self.b_dec, self.W_enc)
        return Codes(*topk_relu(pre_NF, self.k), self.num_latents)

    def losses(self, x_ND: Tensor, y_ND: Tensor, output: CoderOutput, progress: StepContext) -> dict[str, Tensor]:
        """Return ``recon`` (the FVU) and, if a latent is dead and ``auxk_alpha`` is not 0, ``auxk``."""
        n, variance = progress.n_tokens, progress.data_variance
        terms = {"recon": reconstruction_loss(y_ND, output.reconstruction, n, variance)}
        if self.auxk_alpha and progress.dead_mask is not None:
            residual = (y_ND - output.reconstruction).detach()
            terms["auxk"] = self.auxk_alpha * self._compute_auxk_loss(x_ND, residual, progress.dead_mask, progress)
        return terms

    def _compute_auxk_loss(self, x_ND: Tensor, residual_ND: Tensor, dead: Tensor, progress: StepContext) -> Tensor:
        """Return the AuxK loss; its gradient reaches ``W_enc``, ``b_enc`` and ``W_dec``, but not ``b_dec``."""
        dead_indices = dead.nonzero().squeeze(1)
        k_aux = default_k_aux(self.d_in)
        k = min(k_aux, len(dead_indices))
        pre = torch.addmm(self.b_enc[dead_indices], x_ND - self.b_dec.detach(), self.W_enc[:, dead_indices])
        values, indices = topk_relu(pre, k)
        estimate = sparse_decode(values, indices, self.W_dec[dead_indices])
        dead_share = torch.tensor(min(len(dead_indices) / k_aux, 1.0), device=x_ND.device)
        return auxk_loss(residual_ND, estimate, progress.n_tokens, progress.residual_variance, dead_share)

"""Base class of all coders: four parameters, an encoder, a linear decoder, and loss terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from saetrain.ops import sparse_decode
from saetrain.types import CoderOutput, Codes, StepContext

ENCODER_INIT_NORM = 0.3
"""Norm of the columns of the initial encoder. With 1, the first reconstructions are several times too large, and the
first steps only shrink them (docs/recipe.md)."""
ROWS_PER_CHUNK = 256
"""Latents per chunk of projection and renormalization."""


class SparseCoder(nn.Module, ABC):
    """x (N, D) -> code -> x̂ (N, D), with ``W_enc`` (D, F), ``b_enc`` (F,), ``W_dec`` (F, D), ``b_dec`` (D,).

    The parameters are fp32. The rows of ``W_dec`` have unit norm. The encoder is initialized with the transpose of
    ``W_dec`` times ENCODER_INIT_NORM.
    """

    auxk_alpha: float = 0.0
    """Weight of the loss over dead latents; 0 for coders without one."""
    encoder_parameters: ClassVar[frozenset[str]] = frozenset({"W_enc", "b_enc"})
    """Parameters with the encoder's learning rate; the matrices among them decay."""
    latent_dims: ClassVar[Mapping[str, int]] = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
    """{parameter with one entry per latent: dimension of the latents}."""
    updates_idle_latents: bool = False
    """Whether Adam also updates latents that have no gradient in a step."""
    has_unit_norm_decoder: bool = True
    """Whether training keeps the rows of ``W_dec`` at unit norm."""

    def __init__(self, d_in: int, num_latents: int, seed: int = 0) -> None:
        super().__init__()
        assert d_in > 0, d_in
        assert num_latents > 0, num_latents
        self.d_in, self.num_latents = d_in, num_latents
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(num_latents, d_in, generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(directions)
        # W_enc is a transposed view, so that its memory has one row per latent: the kernels read whole latents.
        self.W_enc = nn.Parameter((ENCODER_INIT_NORM * directions).T)
        self.b_enc = nn.Parameter(torch.zeros(num_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @abstractmethod
    def encode(self, x_ND: Tensor) -> Codes:
        """Return the code of each row of ``x_ND``."""

    @abstractmethod
    def losses(self, x_ND: Tensor, y_ND: Tensor, output: CoderOutput, progress: StepContext) -> dict[str, Tensor]:
        """Return named, weighted loss terms; each is this micro-batch's share of the term of the optimizer step."""

    def decode(self, codes: Codes) -> Tensor:
        """Return the reconstruction (N, D) of a code."""
        if codes.indices is None:
            return codes.values @ self.W_dec + self.b_dec
        return sparse_decode(codes.values, codes.indices, self.W_dec) + self.b_dec

    def forward(self, x_ND: Tensor, y_ND: Tensor, progress: StepContext) -> CoderOutput:
        """Return the code of ``x_ND``, the reconstruction of ``y_ND``, and the losses."""
        codes = self.encode(x_ND)
        output = CoderOutput(codes, self.decode(codes))
        output.losses = self.losses(x_ND, y_ND, output, progress)
        return output

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Remove the part of the gradient of ``W_dec`` that is parallel to its rows (Bricken et al. 2023)."""
        assert self.W_dec.grad is not None
        # A chunk stays in a core's cache between the product and the subtraction.
        chunks = (self.W_dec.grad.split(ROWS_PER_CHUNK), self.W_dec.split(ROWS_PER_CHUNK))
        for grad, weight in zip(*chunks, strict=True):
            grad.addcmul_((grad * weight).sum(dim=1, keepdim=True), weight, value=-1)

    @torch.no_grad()
    def renormalize_decoder(self, rows: Tensor | None = None) -> None:
        """Scale the rows of ``W_dec`` to unit norm: all rows, or those with the indices ``rows`` (int64)."""
        tiny = torch.finfo(torch.float32).tiny
        if rows is None:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(tiny))
            return
        for chunk in rows.split(ROWS_PER_CHUNK):
            weight = self.W_dec[chunk]
            self.W_dec[chunk] = weight / weight.norm(dim=1, keepdim=True).clamp_min(tiny)

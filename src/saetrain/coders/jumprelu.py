"""JumpReLU SAE with a target L0: Rajamanoharan et al., Jumping ahead, arXiv 2407.14435."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saetrain.coders.base import ENCODER_INIT_NORM, CoderSettings, SparseCoder
from saetrain.coders.l0_control import move_target_, sum_l0
from saetrain.ops import linear_above
from saetrain.settings import Factor, PositiveFactor
from saetrain.types import Codes, Encoded, StepContext

FIRST_TARGET = 0.95
"""Initial target of the L0 loss, relative to k; trial runs ended at 0.95 to 0.97."""


@dataclass(frozen=True, kw_only=True)
class JumpReLUSettings(CoderSettings):
    """SAE: size and sparsity."""

    l0_weight: Factor = 0.5
    """Weight of the loss that keeps the L0 at k: the mean square of its relative deviation per token."""
    bandwidth: PositiveFactor = 0.5
    """Width of the window around a threshold in which pre-activations train it, in units of the normalized input."""
    dead_pre_weight: Factor = 0.0
    """Weight of the loss that brings the pre-activations of dead latents to their thresholds."""


class JumpReLU(SparseCoder):
    """JumpReLU coder: z = W_enc (x - b_dec) + b_enc, f = z·1[z > θ], x̂ = W_dec f + b_dec, with one θ per latent.

    Loss: FVU + λ · mean over tokens of (L0_t / k - T)² + c · mean over tokens of Σ ReLU(θ - z) over dead latents. The
    quadratic loss per token is that of SAELens and Gemma Scope 2. With T = 1, a small λ leaves the L0 above k and a
    large one makes the reconstruction worse. So λ is small, and T, a buffer, is moved until the mean L0 is k.

    Gradients with respect to θ are estimated in a window of width ε: ∂f/∂θ = -(θ/ε)·1[|z - θ| < ε/2] and
    ∂L0/∂θ = -(1/ε)·1[|z - θ| < ε/2]. θ is fp32, not a logarithm, and at least 0; it starts where about k latents fire
    on a token. Inputs have unit mean square per dimension.
    """

    Settings = JumpReLUSettings
    lr_scale = 1.0
    latents_compete = False
    recorded_settings = ("k",)
    training_buffers = frozenset({"l0_target"})
    encoder_parameters: ClassVar[frozenset[str]] = SparseCoder.encoder_parameters | {"threshold"}
    latent_dims: ClassVar[Mapping[str, int]] = {**SparseCoder.latent_dims, "threshold": 0}
    l0_target: Tensor

    def __init__(
        self,
        d_in: int,
        num_latents: int,
        k: int,
        l0_weight: float,
        bandwidth: float,
        dead_pre_weight: float,
        seed: int = 0,
        d_out: int | None = None,
    ) -> None:
        super().__init__(d_in, num_latents, seed, d_out)
        self.k, self.l0_weight, self.bandwidth, self.dead_pre_weight = k, l0_weight, bandwidth, dead_pre_weight
        # The initial pre-activations are about normal, with the norm of the encoder's columns as deviation.
        rate = min(k / num_latents, 0.5)
        first = ENCODER_INIT_NORM * statistics.NormalDist().inv_cdf(1 - rate)
        self.threshold = nn.Parameter(torch.full((num_latents,), first))
        self.register_buffer("l0_target", torch.tensor(FIRST_TARGET))

    @classmethod
    def build(cls, settings: Any, d_in: int, d_out: int | None = None, *, seed: int = 0) -> JumpReLU:
        """Return a coder with initial weights."""
        weights = settings.l0_weight, settings.bandwidth, settings.dead_pre_weight
        return cls(d_in, settings.resolve_num_latents(d_in), settings.k, *weights, seed, d_out)

    def encode(self, x_ND: Tensor) -> Codes:
        """Return the pre-activations above the thresholds."""
        return self._encode_above(x_ND, self.threshold)

    def _encode_above(self, x_ND: Tensor, floor_F: Tensor) -> Codes:
        assert x_ND.shape[1] == self.d_in, tuple(x_ND.shape)
        return linear_above(x_ND, self.W_enc.T, self.b_enc, floor_F.detach(), self.b_dec if self.is_sae else None)

    def encode_train(self, x_ND: Tensor, ctx: StepContext) -> Encoded:
        """Return the code, with zeros for the pairs in the window below a threshold, and ``l0``, (N,) of each token."""
        pairs = self._encode_above(x_ND, self.threshold - self.bandwidth / 2)
        assert pairs.indices is not None
        values_P, steps_P = _JumpReLU.apply(pairs.values, self.threshold[pairs.indices], self.bandwidth)
        l0_N = steps_P.new_zeros(len(x_ND)).scatter_add(0, pairs.token_of_pair(), steps_P)
        codes = Codes(values_P, pairs.indices, self.num_latents, pairs.offsets, pairs.cache)
        return Encoded(codes, {"x": x_ND, "l0": l0_N}, sum_l0(codes.l0_per_token()))

    def losses(self, y_ND: Tensor, encoded: Encoded, y_hat_ND: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """Return ``recon`` (the FVU), ``l0`` and, for dead latents if ``dead_pre_weight`` is not 0, ``dead_pre``."""
        terms = super().losses(y_ND, encoded, y_hat_ND, ctx)
        deviation_N = encoded.extras["l0"] / self.k - self.l0_target
        terms["l0"] = self.l0_weight * deviation_N.square().sum() / ctx.n_tokens
        if self.dead_pre_weight and ctx.dead_mask is not None:
            rows = ctx.dead_mask.nonzero().squeeze(1)
            centred_ND = self.centre(encoded.extras["x"]).detach()
            pre_NA = torch.addmm(self.b_enc[rows], centred_ND, self.W_enc.T[rows].T)
            missing = (self.threshold[rows] - pre_NA).relu().sum()
            terms["dead_pre"] = self.dead_pre_weight * missing / ctx.n_tokens
        return terms

    @torch.no_grad()
    def after_step(self, sums: Mapping[str, Tensor], ctx: StepContext) -> None:
        """Clamp the thresholds, and move the target of the loss so that the mean L0 becomes k."""
        self.threshold.clamp_(min=0)
        move_target_(self.l0_target, sums, self.k)

    @torch.no_grad()
    def scale_code_units_(self, factor: float | Tensor) -> None:
        """Multiply the biases and the thresholds."""
        super().scale_code_units_(factor)
        self.threshold.mul_(factor)

    @property
    def uses_dead_latents(self) -> bool:
        """Whether the loss on pre-activations of dead latents is enabled."""
        return self.dead_pre_weight > 0

    def expected_l0(self) -> int | None:
        """Return k, to which the L0 is controlled; None if the SAE's file does not have it."""
        return self.k


class _JumpReLU(torch.autograd.Function):
    """Values z·1[z > θ] and steps 1[z > θ] of pairs, with the gradients of the class above."""

    @staticmethod
    def forward(ctx: Any, z_P: Tensor, theta_P: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        is_active = z_P > theta_P
        ctx.save_for_backward(z_P, theta_P, is_active)
        ctx.bandwidth = bandwidth
        return z_P * is_active, is_active.to(z_P)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_values: Tensor, grad_steps: Tensor) -> tuple[Tensor, Tensor, None]:
        z_P, theta_P, is_active = ctx.saved_tensors
        window = ((z_P - theta_P).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        return grad_values * is_active, -(theta_P * grad_values + grad_steps) * window, None

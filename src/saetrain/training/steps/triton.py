"""TopK training step with the Triton kernels, which never synchronizes with the device.

Weight gradients are stored only for gradient accumulation and with dense products.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.ops.cuda_graph import GraphedCallable
from saetrain.ops.triton import kernels as triton_kernels
from saetrain.ops.triton import launch as triton_launch
from saetrain.optim import BETAS, ENCODER_LR_RATIO, EPS, OptimSettings
from saetrain.training.steps.auxk import DeadLatents, auxk_forward_backward
from saetrain.training.steps.base import (
    DeviceStep,
    Objective,
    StepRequest,
    StepStats,
    build_adam_state,
    explain_kernel_limits,
)
from saetrain.types import StepContext

BOUND_MARGIN = 1.01
"""Factor by which rounding may raise a gradient norm above its bound."""
DENSE_LIMIT = 128
"""Largest F / k for which dense products are faster, because they read memory in order."""
GRAPH_MAX_WORK = 4 << 33
"""Largest N·D·F for which CUDA graphs are used: up to there, launching kernels takes as long as running them."""


@dataclass
class StepGrads:
    """Weight gradients of a micro-batch, as inputs of the latent pass.

    The gradient rows are computed from ``pairs``, ``segment_sums``, ``x``, ``residual`` and ``loss_scale``, plus the
    additional rows ``extra`` {`row`, `enc`, `dec`} of AuxK. With dense products, ``grads`` {`enc`, `dec`} contains the
    gradients themselves.
    """

    x: Tensor
    loss_scale: Tensor
    residual: Tensor
    pairs: triton_launch.SegmentedPairs | None = None
    segment_sums: tuple[Tensor, Tensor] | None = None
    grads: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class ComputedStep:
    """Results of a micro-batch: weight and bias gradients, an upper bound of their norm, residual and statistics."""

    step_grads: StepGrads
    residual: Tensor
    g_b_enc: Tensor
    g_b_dec: Tensor
    norm_bound: Tensor
    stats: StepStats


class TritonStep(DeviceStep):
    """Adam step of one TopK coder.

    ``use_bf16``: products in bf16, with fp32 sums, weights and moments. ``no_accumulation``: each step has one
    micro-batch on one rank, so its gradients are used in the update without being accumulated. ``products``: kind of
    products for gradients; `auto` chooses by F / k. ``use_cuda_graphs``: None uses CUDA graphs for small steps, where
    launching kernels dominates.
    """

    def __init__(
        self,
        coder: TopK,
        settings: OptimSettings,
        *,
        use_bf16: bool,
        no_accumulation: bool,
        products: Literal["auto", "sparse", "dense"] = "auto",
        use_cuda_graphs: bool | None = None,
    ) -> None:
        self._coder, self._settings, self._use_bf16, self._no_accumulation = coder, settings, use_bf16, no_accumulation
        self._use_dense = coder.num_latents <= DENSE_LIMIT * coder.k if products == "auto" else products == "dense"
        self._use_cuda_graphs, self._graphed_compute, self._graphed_update = (
            use_cuda_graphs,
            GraphedCallable[ComputedStep](),
            GraphedCallable[Tensor](),
        )
        # Both have one row per latent; the coder's W_enc is a transposed view of the first.
        self._W = {"enc": coder.W_enc.detach().T, "dec": coder.W_dec.detach()}
        self._b = {"enc": coder.b_enc.detach(), "dec": coder.b_dec.detach()}
        assert all(value.is_contiguous() for value in self._W.values()), "weights need one contiguous row per latent"
        whole = {**self._W, "b": self._b["enc"], "b_dec": self._b["dec"]}
        self._moments = {
            f"{name}_{tensor_name}": torch.zeros_like(whole[tensor_name])
            for tensor_name in whole
            for name in ("m", "v")
        }
        self._bf16_weights = {name: value.bfloat16() for name, value in self._W.items()} if use_bf16 else {}
        self._grad_sums = {} if no_accumulation else {name: torch.zeros_like(value) for name, value in self._W.items()}
        zeros = self._b["dec"].new_zeros
        self._g_b_enc, self._g_b_dec, self._norm_bound = zeros(coder.num_latents), zeros(coder.d_in), zeros(())
        self._squared_norms = zeros(coder.num_latents)
        self._count, self._lr = zeros((), dtype=torch.float64), zeros((), dtype=torch.float64)
        self._true = zeros((), dtype=torch.bool).logical_not()
        self._step_grads: StepGrads | None = None
        self._ctx: StepContext | None = None
        self._is_empty, self._replays_graph = True, False

    @classmethod
    def unsupported(cls, request: StepRequest) -> str | None:
        """Return why the Triton kernels cannot be used, or None."""
        limit = explain_kernel_limits(request)
        if limit is not None:
            return limit
        # Triton's interpreter, which the tests use, runs on a CPU.
        if request.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"they run on a GPU, not on {request.device}"
        if request.device.type != "cuda":
            return None
        from saetrain.training.steps.self_check import find_kernel_problem

        # The check takes seconds at the first start on a machine, because an untested compiler or GPU may be wrong.
        return find_kernel_problem(request.device)

    @property
    def _weights(self) -> Mapping[str, Tensor]:
        """Encoder and decoder weights in the dtype of the products."""
        return self._bf16_weights or self._W

    @torch.no_grad()
    def forward_backward(
        self, x_ND: Tensor, ctx: StepContext, y_ND: Tensor | None = None, objective: Objective | None = None
    ) -> StepStats:
        """Compute code, residual and pre-activation gradients; with accumulation also the weight gradients."""
        assert y_ND is None, "the explicit gradients are those of an SAE"
        assert objective is None, "the explicit gradients are those of the coder's own loss"
        self._ctx, x_ND = ctx, x_ND.contiguous()
        self._replays_graph = self._can_replay_graph(x_ND, ctx)
        inputs = x_ND, ctx.data_variance
        computed = (
            self._graphed_compute(self._compute_step, *inputs) if self._replays_graph else self._compute_step(*inputs)
        )
        self._step_grads = computed.step_grads
        if self._coder.auxk_alpha and ctx.dead_mask is not None:
            self._add_auxk(computed, ctx)
        self._accumulate_step(computed)
        return computed.stats

    def _can_replay_graph(self, x_ND: Tensor, ctx: StepContext) -> bool:
        """Return whether every step launches the same kernels, as far as the host knows without synchronizing."""
        if (
            not self._no_accumulation
            or not x_ND.is_cuda
            or ctx.dead_mask is not None
            or not self._graphed_compute.accepts_shape(x_ND)
        ):
            return False
        return (
            x_ND.numel() * self._coder.num_latents <= GRAPH_MAX_WORK
            if self._use_cuda_graphs is None
            else self._use_cuda_graphs
        )

    def _compute_step(self, x_ND: Tensor, variance: Tensor) -> ComputedStep:
        assert self._ctx is not None
        coder, weights = self._coder, self._weights
        centred = x_ND - self._b["dec"]
        encoder_input = centred.to(weights["enc"].dtype)
        values, indices = triton_launch.encode_topk(encoder_input, weights["enc"], self._b["enc"], coder.k)
        loss_scale = 2 / (self._ctx.n_tokens * variance)
        backward = self._backward_dense if self._use_dense else self._backward_sparse
        step_grads, residual, g_b_enc, square, fired = backward(centred, encoder_input, values, indices, loss_scale)
        residual_sum = residual.sum(dim=0)
        g_b_dec = -(loss_scale * residual_sum + (g_b_enc.to(weights["enc"].dtype) @ weights["enc"]).float())
        residual_square = residual.square().sum()
        stats = StepStats(
            fired, len(x_ND), {"recon": residual_square * (loss_scale / 2)}, residual_sum, residual_square
        )
        return ComputedStep(step_grads, residual, g_b_enc, g_b_dec, (square + g_b_dec.square().sum()).sqrt(), stats)

    def _backward_sparse(
        self, centred: Tensor, encoder_input: Tensor, values: Tensor, indices: Tensor, loss_scale: Tensor
    ) -> tuple[StepGrads, Tensor, Tensor, Tensor, Tensor]:
        """Return (StepGrads, residual, gradient of b_enc, bound of the squared norm without b_dec, firing counts)."""
        residual, residual_copy, grad_pre, norms = triton_launch.compute_residuals(
            centred, self._weights["dec"], values, indices, loss_scale
        )
        pairs = triton_launch.sort_pairs(values, indices, grad_pre, self._coder.num_latents)
        g_b_enc, squares = triton_launch.bound_latent_norms(
            pairs, torch.linalg.vector_norm(centred, dim=1), norms, loss_scale
        )
        step_grads = StepGrads(
            encoder_input,
            loss_scale,
            residual_copy,
            pairs,
            triton_launch.sum_segments(pairs, encoder_input, residual_copy, loss_scale),
        )
        return step_grads, residual, g_b_enc, squares.sum(), pairs.starts.diff()

    def _backward_dense(
        self, centred: Tensor, encoder_input: Tensor, values: Tensor, indices: Tensor, loss_scale: Tensor
    ) -> tuple[StepGrads, Tensor, Tensor, Tensor, Tensor]:
        """Compute the results of :meth:`_backward_sparse` with dense products."""
        W_dec = self._weights["dec"]
        code = encoder_input.new_zeros(len(values), self._coder.num_latents)
        code.scatter_(1, indices.long(), values.to(code.dtype))
        active = code > 0
        residual = centred - (code @ W_dec).float()
        scaled = (residual * -loss_scale).to(code.dtype)
        grad_pre = (scaled @ W_dec.T).mul_(active)
        grads = {"enc": (grad_pre.T @ encoder_input).float(), "dec": (code.T @ scaled).float()}
        g_b_enc = grad_pre.sum(dim=0, dtype=torch.float32)
        square = torch.stack([each.square().sum() for each in (*grads.values(), g_b_enc)]).sum()
        return StepGrads(encoder_input, loss_scale, residual, grads=grads), residual, g_b_enc, square, active.sum(dim=0)

    def _add_auxk(self, computed: ComputedStep, ctx: StepContext) -> None:
        """Add AuxK's loss and its gradient rows to the results."""
        assert ctx.dead_mask is not None
        step_grads, latents = computed.step_grads, self._coder.num_latents
        max_dead = latents if ctx.max_n_dead is None else ctx.max_n_dead
        dead = DeadLatents.from_bounded_mask(max_dead, ctx.dead_mask)
        aux = auxk_forward_backward(self._coder, self._weights, step_grads.x, computed.residual, dead, ctx)
        computed.stats.losses["auxk"] = aux.loss
        index = dead.inverse_index(latents)
        computed.g_b_enc += _scatter_rows(aux.b_enc, index)
        if self._use_dense:
            step_grads.grads["enc"] += _scatter_rows(aux.W_enc, index)
            step_grads.grads["dec"] += _scatter_rows(aux.W_dec, index)
        else:
            step_grads.extra = {"row": index, "enc": aux.W_enc.contiguous(), "dec": aux.W_dec.contiguous()}
        norm = torch.stack([value.square().sum() for value in (aux.W_enc, aux.W_dec, aux.b_enc)]).sum().sqrt()
        computed.norm_bound = computed.norm_bound + norm

    def _accumulate_step(self, computed: ComputedStep) -> None:
        """Accumulate the micro-batch's bias gradients and, with accumulation, its weight gradients."""
        if not self._no_accumulation and self._use_dense:
            for name, value in computed.step_grads.grads.items():
                if self._is_empty:
                    self._grad_sums[name].copy_(value)
                else:
                    self._grad_sums[name].add_(value)
        elif not self._no_accumulation:
            self._run_latent_pass(triton_kernels.STORE if self._is_empty else triton_kernels.ADD, self._true)
        # The norm of a sum of gradients, over micro-batches and ranks, is at most the sum of their norms.
        self._norm_bound = computed.norm_bound if self._is_empty else self._norm_bound + computed.norm_bound
        self._g_b_enc = computed.g_b_enc if self._is_empty else self._g_b_enc + computed.g_b_enc
        self._g_b_dec = computed.g_b_dec if self._is_empty else self._g_b_dec + computed.g_b_dec
        self._is_empty = False

    def _run_latent_pass(self, mode: int, ok: Tensor, rates: Tensor | None = None, clip: Tensor | None = None) -> None:
        """Run the latent pass on the micro-batch, or on the stored gradients, unless ``ok`` is false."""
        step_grads, W = self._step_grads, self._W
        assert step_grads is not None
        extra, width, unused = step_grads.extra, self._coder.d_in, self._squared_norms
        grads = self._grad_sums or step_grads.grads
        from_memory = bool(grads) and mode in (triton_kernels.MEASURE, triton_kernels.UPDATE)
        pairs = (unused,) * 7
        if step_grads.pairs is not None and step_grads.segment_sums is not None:
            p = step_grads.pairs
            pairs = (p.starts, p.token, p.value, p.grad_pre, p.segment_starts, *step_grads.segment_sums)
        triton_kernels.latent_pass_kernel[(self._coder.num_latents,)](
            ok.int(), *pairs, step_grads.x, step_grads.residual, step_grads.loss_scale,
            extra.get("row", unused), extra.get("enc", unused), extra.get("dec", unused),
            self._g_b_enc, grads.get("enc", unused), grads.get("dec", unused),
            W["enc"], W["dec"], self._b["enc"], self._weights["enc"], self._weights["dec"],
            *(self._moments[name] for name in ("m_enc", "v_enc", "m_dec", "v_dec", "m_b", "v_b")),
            self._squared_norms, unused if rates is None else rates, unused if clip is None else clip, width,
            BETA1=BETAS[0], BETA2=BETAS[1], EPS=EPS, MODE=mode, STORED=from_memory, EXTRA=bool(extra),
            BF16=self._use_bf16, BLOCK_P=triton_launch.rows_per_tile(width), **triton_launch.row_launch_options(width),
        )  # fmt: skip

    def gradients(self) -> list[Tensor]:
        """Return the accumulated gradients."""
        assert not self._no_accumulation, "without accumulation, gradients are not stored"
        return [self._grad_sums["enc"], self._grad_sums["dec"], self._g_b_enc, self._g_b_dec, self._norm_bound]

    def norm_bound(self) -> Tensor:
        """Return a bound from norms of rows, as a scalar on the device."""
        return self._norm_bound

    @torch.no_grad()
    def optimizer_step(self, lr: float, ok: Tensor | None = None) -> Tensor:
        """Project, clip, apply Adam and renormalize; return the norm. A gradient that is not finite changes nothing."""
        self._lr.fill_(lr)
        ok = self._true if ok is None else ok
        norm = self._graphed_update(self._update_parameters, ok) if self._replays_graph else self._update_parameters(ok)
        self.zero_grad()
        return norm

    def _update_parameters(self, ok: Tensor) -> Tensor:
        limit = self._settings.max_grad_norm
        is_applied = self._norm_bound.isfinite() & ok
        self._count += is_applied
        clip, b_dec_square = torch.ones_like(self._norm_bound), self._g_b_dec.square().sum()
        if limit > 0:
            needs_clipping = is_applied & (BOUND_MARGIN * self._norm_bound > limit)
            # The cheap bound usually rules out clipping, and then the kernel returns at once.
            self._run_latent_pass(triton_kernels.MEASURE, needs_clipping)
            norm = torch.where(needs_clipping, (self._squared_norms.sum() + b_dec_square).sqrt(), self._norm_bound)
            clip = torch.where(needs_clipping, (limit / (norm + 1e-6)).clamp_max(1.0), 1.0)
        first, second = (1 - beta**self._count for beta in BETAS)
        decay_factor = 1 - self._lr * (ENCODER_LR_RATIO * self._settings.effective_weight_decay)
        rates = torch.stack(
            [self._lr / first, ENCODER_LR_RATIO * self._lr / first, decay_factor, second.rsqrt()]
        ).float()
        self._run_latent_pass(triton_kernels.UPDATE, is_applied, rates, clip)
        self._update_b_dec(is_applied, self._g_b_dec * clip, rates)
        return (self._squared_norms.sum() + b_dec_square).sqrt()

    def _update_b_dec(self, is_applied: Tensor, gradient: Tensor, rates: Tensor) -> None:
        m, v, b = self._moments["m_b_dec"], self._moments["v_b_dec"], self._b["dec"]
        first = m.lerp(gradient, 1 - BETAS[0])
        second = BETAS[1] * v + (1 - BETAS[1]) * gradient.square()
        moved = b - rates[0] * first / (second.sqrt() * rates[3] + EPS)
        for own, new in ((m, first), (v, second), (b, moved)):
            own.copy_(torch.where(is_applied, new, own))

    def zero_grad(self) -> None:
        """Discard the gradients and the micro-batch."""
        self._step_grads, self._is_empty = None, True

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state with the names of torch's Adam; the encoder's moments have the shape (D, F) of ``W_enc``."""
        return build_adam_state(self._moments, self._count.float().cpu())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load moments and step count, and copy the coder's weights to bf16 again."""
        own = self.state_dict()
        for name, value in state.items():
            own[name].copy_(value)
        self._count.copy_(state["W_dec.step"])
        for name, copy in self._bf16_weights.items():
            copy.copy_(self._W[name])


def _scatter_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Return ``rows[index]``, with 0 where the index is -1; a gather, because scatter-adds are atomic on a GPU."""
    # Index -1 selects the appended row of zeros.
    return torch.cat([rows, torch.zeros_like(rows[:1])])[index]

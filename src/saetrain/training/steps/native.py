"""Training step with the C++ kernels for CPUs; weight gradients are stored only for gradient accumulation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from weakref import ref

import torch
from torch import Tensor

from saetrain.coders.auxk import AuxKCoder
from saetrain.coders.batchtopk import BatchTopK
from saetrain.coders.jumprelu import JumpReLU
from saetrain.coders.l0_control import sum_l0
from saetrain.coders.matryoshka import Matryoshka
from saetrain.coders.topk import TopK
from saetrain.ops.cpu_features import dense_limit
from saetrain.ops.native import bindings as native
from saetrain.optim import BETAS, ENCODER_LR_RATIO, EPS, OptimSettings
from saetrain.training.steps.auxk import DeadLatents, auxk_forward_backward
from saetrain.training.steps.base import (
    Objective,
    StepRequest,
    StepStats,
    TrainStep,
    build_adam_state,
    explain_kernel_limits,
)
from saetrain.training.steps.native_workspace import Workspace, WorkspaceShape, get_workspace
from saetrain.types import StepContext, TokenGroups

NATIVE_CODERS = (TopK, BatchTopK, Matryoshka, JumpReLU)
BOUND_MARGIN, BOUND_MARGIN_BF16 = 1.001, 1.01
"""Factors by which rounding may raise a gradient norm above its bound; bf16 numbers have 8 significant bits."""


class NativeStep(TrainStep):
    """Adam step of one SAE whose code has the k largest pre-activations of each token, those of a group, or all above
    thresholds.

    ``use_bf16``: products in bf16, with fp32 sums, weights and moments. ``no_accumulation``: each step has one
    micro-batch on one rank, so its gradients are used in the update without being stored.
    """

    def __init__(
        self, coder: TopK | BatchTopK | JumpReLU, settings: OptimSettings, *, use_bf16: bool, no_accumulation: bool
    ) -> None:
        self._coder, self._settings, self._use_bf16, self._no_accumulation = coder, settings, use_bf16, no_accumulation
        self._level_stops = coder.prefix_sizes if isinstance(coder, Matryoshka) else (coder.num_latents,)
        is_nested = len(self._level_stops) > 1
        self.uses_dense_products = use_bf16 and not is_nested and coder.num_latents <= dense_limit(use_bf16) * coder.k
        self._step_count = 0
        # Both have one row per latent; the coder's W_enc is a transposed view of the first.
        self._W = {"enc": coder.W_enc.detach().T, "dec": coder.W_dec.detach()}
        self._b = {"enc": coder.b_enc.detach(), "dec": coder.b_dec.detach()}
        self._thresholds = {"threshold": coder.threshold.detach()} if isinstance(coder, JumpReLU) else {}
        self._moments = {
            f"{name}_{what}": torch.zeros_like(value)
            for what, value in (
                *self._W.items(),
                ("b", self._b["enc"]),
                ("b_dec", self._b["dec"]),
                *self._thresholds.items(),
            )
            for name in ("m", "v")
        }
        self._bf16_weights = {name: value.bfloat16() for name, value in self._W.items()} if use_bf16 else {}
        self._encoder_norms = self._W["enc"].norm(dim=1)
        grad_shapes = {} if no_accumulation else {**self._W, "b": self._b["enc"]}
        self._has_gradients = False
        self._grads = {f"g_{what}": torch.zeros_like(value) for what, value in grad_shapes.items()}
        self._g_thresholds = {
            f"g_{name}": torch.zeros_like(value, dtype=torch.double) for name, value in self._thresholds.items()
        }
        self._g_b_dec_encoder = torch.zeros(coder.d_in, dtype=torch.double)
        self._squared_norm = torch.zeros(1, dtype=torch.double)
        self._g_b_dec = torch.zeros(coder.d_in, dtype=torch.double)
        self._step: native.SaetrainStep | None = None
        self._workspace: Workspace | None = None
        self._shared_workspace: Workspace | None = None
        self._live_tensors: dict[str, Tensor] = {}
        self._extra_norm = 0.0
        self._norm_bound = 0.0
        self._norm_bound_sum = torch.zeros(1, dtype=torch.double)

    @classmethod
    def unsupported(cls, request: StepRequest) -> str | None:
        """Return why the C++ kernels cannot be used, or None."""
        limit = explain_kernel_limits(request, NATIVE_CODERS)
        if limit is not None:
            return limit
        if request.device.type != "cpu":
            return f"they run on a CPU, not on {request.device}"
        try:
            native.load_library()
        except OSError as error:
            return f"they can't be built: {error}"
        return None

    def forward_backward(
        self, x_ND: Tensor, ctx: StepContext, y_ND: Tensor | None = None, objective: Objective | None = None
    ) -> StepStats:
        """Compute code, residual and pre-activation gradients; with accumulation also the weight gradients."""
        assert y_ND is None, "the explicit gradients are those of an SAE"
        assert objective is None, "the explicit gradients are those of the coder's own loss"
        coder, groups = self._coder, None
        if isinstance(coder, BatchTopK):
            groups, x_ND = (ctx.groups or TokenGroups.of_micro_batch(x_ND)).sort_rows(x_ND)
        loss_scale = 2 / (ctx.n_tokens * float(ctx.data_variance))
        step, work = self._prepare_step(x_ND.contiguous(), loss_scale, groups)
        native.center_inputs(step, work["x_enc"], work["x_norms"])
        losses: dict[str, Tensor] = {}
        if isinstance(coder, BatchTopK):
            assert groups is not None
            sums = self._encode_groups(coder, work, groups)
        elif isinstance(coder, JumpReLU):
            sums, losses["l0"] = self._encode_above(coder, step, work, ctx)
        else:
            sums = self._encode(work)
        if work.dense is None:
            native.compute_residuals(step)
        else:
            native.compute_residuals_dense(step, self._weights["dec"], work["residual_copy"][0], work.dense, work.pre)
        losses["recon"] = (work["residual_square"][-1] * (loss_scale / 2)).float()
        if isinstance(coder, Matryoshka):
            losses["nested"] = (work["residual_square"][:-1].sum() * (loss_scale / 2)).float()
        self._extra_norm = 0.0
        if isinstance(coder, AuxKCoder) and coder.auxk_alpha and ctx.dead_mask is not None:
            losses["auxk"] = self._add_auxk(coder, ctx)
        if not self._no_accumulation:
            self._run_latent_pass(native.ADD if self._has_gradients else native.STORE)
            self._has_gradients = True
            self._g_b_dec += self._g_b_dec_encoder - loss_scale * work["residual_sum"].sum(dim=0)
            # The norm of a sum of gradients, over micro-batches and ranks, is at most the sum of their norms.
            self._norm_bound_sum += self._loose_bound(step)
        return StepStats(
            fired=work["starts"].diff(),
            tokens=len(x_ND),
            losses=losses,
            residual_sum=work["residual_sum"][-1].float(),
            residual_square=work["residual_square"][-1].float(),
            sums=sums,
        )

    def _encode(self, work: Workspace) -> dict[str, Tensor]:
        """Set the k largest pre-activations of each token as the code."""
        weights, bias = self._weights["enc"], self._b["enc"]
        native.encode_topk(work["x_enc"], weights, bias, work.pre, work["values"], work["indices"])
        return {}

    def _encode_groups(self, coder: BatchTopK, work: Workspace, groups: TokenGroups) -> dict[str, Tensor]:
        """Set the largest pre-activations of each group as the code; return the sums of :class:`BatchTopK`."""
        assert work.group_search is not None
        smallest = work.group_search.run(
            work["x_enc"], self._weights["enc"], self._b["enc"], work.pre, groups, float(coder.threshold)
        )
        # The comparisons drop NaN, so store one in the code, where it makes the loss NaN.
        if any(map(math.isnan, smallest)):
            work["values"][:1], work["indices"][:1] = math.nan, 0
            work["offsets"][1:].clamp_(min=1)
        return BatchTopK.sum_thresholds(torch.tensor(smallest), torch.tensor(groups.n_groups), groups)

    def _encode_above(
        self, coder: JumpReLU, step: native.SaetrainStep, work: Workspace, ctx: StepContext
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Set the pre-activations above the thresholds as the code; return the sums of :class:`JumpReLU`, and its loss.

        The pairs in the window below a threshold get the value 0.
        """
        search, threshold = work.threshold_search, self._thresholds["threshold"]
        assert search is not None
        floor = threshold - coder.bandwidth / 2
        search.run(work["x_enc"], self._weights["enc"], self._b["enc"], work.pre, floor, threshold)
        native.set_pointers(step, **work.fit_pairs())
        l0_N = search.active_stops - search.offsets[:-1]
        deviation_N = l0_N / coder.k - coder.l0_target
        torch.mul(deviation_N, 2 * coder.l0_weight / (coder.k * ctx.n_tokens), out=work["l0_grad"])
        return sum_l0(l0_N), coder.l0_weight * deviation_N.square().sum() / ctx.n_tokens

    @property
    def _weights(self) -> Mapping[str, Tensor]:
        """Encoder and decoder weights in the dtype of the products."""
        return self._bf16_weights or self._W

    def _prepare_step(
        self, x_ND: Tensor, loss_scale: float, groups: TokenGroups | None
    ) -> tuple[native.SaetrainStep, Workspace]:
        """Set up the arguments of the kernels for one micro-batch."""
        coder = self._coder
        n_groups, wanted = (groups.n_groups, coder.k * groups.group_tokens) if groups else (0, 0)
        shape = WorkspaceShape(
            tokens=len(x_ND),
            width=coder.d_in,
            level_stops=self._level_stops,
            k=coder.k,
            n_groups=n_groups,
            wanted=wanted,
            use_bf16=self._use_bf16,
            use_dense=self.uses_dense_products,
            has_thresholds=bool(self._thresholds),
        )
        work = self._workspace = self._shared_workspace = get_workspace(shape)
        work.owner = ref(self)
        names = {"N": len(x_ND), "D": coder.d_in, "F": coder.num_latents, "L": shape.levels}
        step = self._step = native.SaetrainStep(
            **names, threads=torch.get_num_threads(), use_bf16=self._use_bf16, loss_scale=loss_scale
        )
        if isinstance(coder, JumpReLU):
            step.bandwidth = coder.bandwidth
        self._live_tensors = {"x": x_ND}
        native.set_pointers(
            step,
            x=x_ND,
            **work.tensors,
            **{f"W_{name}": value for name, value in self._W.items()},
            **{f"b_{name}": value for name, value in self._b.items()},
            **{f"W_{name}_bf16": value for name, value in self._bf16_weights.items()},
            **{name: value for name, value in self._moments.items() if not name.endswith("b_dec")},
            **self._thresholds,
            **self._g_thresholds,
            **self._grads,
            g_b_dec=self._g_b_dec_encoder,
            square=self._squared_norm,
        )
        return step, work

    def _current_step(self) -> tuple[native.SaetrainStep, Workspace]:
        assert self._step is not None
        assert self._workspace is not None
        assert self._workspace.owner() is self or not self._no_accumulation, (
            "another SAE has used the workspace of this step"
        )
        return self._step, self._workspace

    def _add_auxk(self, coder: AuxKCoder, ctx: StepContext) -> Tensor:
        """Pass AuxK's gradient rows of the dead latents to the kernels; return the weighted loss."""
        assert ctx.dead_mask is not None
        step, work = self._current_step()
        dead = DeadLatents.from_mask(ctx.dead_mask)
        grads = auxk_forward_backward(coder, self._weights, work["x_enc"], work["residual"][-1], dead, ctx)
        rows = dead.inverse_index(self._coder.num_latents)
        extra = {"extra_row": rows, "extra_enc": grads.W_enc, "extra_dec": grads.W_dec, "extra_b": grads.b_enc}
        self._live_tensors.update(extra)
        native.set_pointers(step, **extra)
        self._extra_norm = float(sum(value.pow(2).sum() for value in (grads.W_enc, grads.W_dec, grads.b_enc))) ** 0.5
        return grads.loss

    def _run_latent_pass(self, mode: int) -> None:
        """Run the latent pass on the micro-batch, or on the accumulated gradients."""
        step, work = self._current_step()
        self._squared_norm.zero_()
        from_memory = not self._no_accumulation and mode in (native.MEASURE, native.UPDATE)
        if not from_memory:
            self._g_b_dec_encoder.zero_()
        if work.dense is None or from_memory:
            native.run_latent_pass(step, mode, self._encoder_norms, from_memory=from_memory)
            return
        native.run_latent_pass_dense(step, mode, self._encoder_norms, self._gradient_inputs, work.dense)

    def gradients(self) -> list[Tensor]:
        """Return the accumulated gradients."""
        assert not self._no_accumulation, "without accumulation, gradients are not stored"
        return [*self._grads.values(), *self._g_thresholds.values(), self._g_b_dec, self._norm_bound_sum]

    def norm_bound(self) -> float:
        """Return a bound from row norms or, if it does not rule out clipping, a tighter bound or the exact norm."""
        step, _ = self._current_step()
        bound = self._loose_bound(step) if self._no_accumulation else float(self._norm_bound_sum[0])
        if self._may_need_clipping(bound) and math.isfinite(bound):
            bound = min(bound, self._tight_bound(step)) if self._no_accumulation else self._measure_norm()
        self._norm_bound = bound
        return bound

    def _loose_bound(self, step: native.SaetrainStep) -> float:
        """Bound the norm of the micro-batch's gradient from norms of rows."""
        grad_b_enc = torch.empty(step.F)
        square = native.bound_squared_norm(step, grad_b_enc) + self._threshold_square()
        direct = step.loss_scale * self._current_step()[1]["residual_sum"].sum(dim=0)
        through_encoder = float(grad_b_enc.abs() @ self._encoder_norms)
        return float((square + (float(direct.norm()) + through_encoder) ** 2) ** 0.5 + self._extra_norm)

    def _tight_bound(self, step: native.SaetrainStep) -> float:
        """Bound the norm of the micro-batch's gradient from singular values of the encoder input and the residual."""
        grad_b_enc = torch.empty(step.F)
        direct = step.loss_scale * self._current_step()[1]["residual_sum"].sum(dim=0)
        square = native.bound_squared_norm(step, grad_b_enc, self._gradient_inputs) + self._threshold_square()
        exact = direct + (grad_b_enc.to(self._weights["enc"].dtype) @ self._weights["enc"]).double()
        return float(1.02 * (square + float(exact.pow(2).sum())) ** 0.5 + self._extra_norm)

    def _threshold_square(self) -> float:
        """Return the squared norm of the gradients of the thresholds so far."""
        return float(sum(value.square().sum() for value in self._g_thresholds.values()))

    def _measure_norm(self) -> float:
        """Compute the exact norm in a pass over the gradients."""
        self._run_latent_pass(native.MEASURE)
        return self._gradient_norm()

    def _may_need_clipping(self, bound: float) -> bool:
        """Return whether a gradient with a norm of at most ``bound`` may have to be clipped."""
        limit = self._settings.max_grad_norm
        return limit > 0 and (BOUND_MARGIN_BF16 if self._use_bf16 else BOUND_MARGIN) * bound > limit

    @property
    def _gradient_inputs(self) -> dict[str, Tensor]:
        """The rows that the weight gradients sum: `enc` (N, D), `dec` (levels, N, D), in the dtype of the products."""
        _, work = self._current_step()
        return {"enc": work["x_enc"], "dec": work["residual_copy" if self._use_bf16 else "residual"]}

    def _gradient_norm(self) -> float:
        return float(self._squared_norm[0] + self._b_dec_gradient().pow(2).sum()) ** 0.5

    def _b_dec_gradient(self) -> Tensor:
        """Return the gradient of ``b_dec`` through decoder and encoder, (D,) fp64."""
        step, work = self._current_step()
        return (
            self._g_b_dec_encoder - step.loss_scale * work["residual_sum"].sum(dim=0)
            if self._no_accumulation
            else self._g_b_dec
        )

    def optimizer_step(self, lr: float) -> Tensor:
        """Project, clip, apply Adam and renormalize in one pass over the latents; return the norm before clipping."""
        step, _ = self._current_step()
        self._step_count += 1
        beta1, beta2 = BETAS
        step.lr, step.encoder_lr, step.decay = lr, ENCODER_LR_RATIO * lr, self._settings.effective_weight_decay
        step.beta1, step.beta2, step.eps = beta1, beta2, EPS
        step.correction1 = 1 - beta1**self._step_count
        step.correction2 = (1 - beta2**self._step_count) ** 0.5
        step.clip, norm, limit = 1.0, self._norm_bound, self._settings.max_grad_norm
        if self._may_need_clipping(self._norm_bound):
            if self._no_accumulation:
                norm = self._measure_norm()
            step.clip = min(1.0, limit / (norm + 1e-6))
        self._run_latent_pass(native.UPDATE)
        norm = self._gradient_norm()
        self._update_b_dec(self._b_dec_gradient().float() * step.clip, step)
        self.zero_grad()
        return torch.tensor(norm)

    def _update_b_dec(self, gradient: Tensor, step: native.SaetrainStep) -> None:
        m, v = self._moments["m_b_dec"], self._moments["v_b_dec"]
        m.lerp_(gradient, 1 - step.beta1)
        v.mul_(step.beta2).addcmul_(gradient, gradient, value=1 - step.beta2)
        denominator = v.sqrt() / step.correction2 + step.eps
        self._b["dec"].addcdiv_(m, denominator, value=-step.lr / step.correction1)

    def zero_grad(self) -> None:
        """Discard the gradients and the micro-batch."""
        self._has_gradients = False
        for value in (*self._g_thresholds.values(), self._g_b_dec, self._norm_bound_sum):
            value.zero_()
        self._step, self._workspace, self._live_tensors = None, None, {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state with the names of torch's Adam; the encoder's moments have the shape (D, F) of ``W_enc``."""
        return build_adam_state(self._moments, torch.tensor(float(self._step_count)))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load moments and step count, and copy the coder's weights to bf16 again."""
        own = self.state_dict()
        for name, value in state.items():
            own[name].copy_(value)
        self._step_count = int(state["W_dec.step"])
        for name, copy in self._bf16_weights.items():
            copy.copy_(self._W[name])
        self._encoder_norms = self._W["enc"].norm(dim=1)

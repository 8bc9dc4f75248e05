"""TopK training step with the C++ kernels for CPUs; weight gradients are stored only for gradient accumulation."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.ops.cpu_features import dense_limit
from saetrain.ops.native import bindings as native
from saetrain.optim import BETAS, ENCODER_LR_RATIO, EPS, OptimSettings
from saetrain.training.auxk import DeadLatents, auxk_forward_backward
from saetrain.training.steps.base import (
    Objective,
    StepRequest,
    StepStats,
    TrainStep,
    build_adam_state,
    explain_kernel_limits,
)
from saetrain.types import StepContext

BOUND_MARGIN, BOUND_MARGIN_BF16 = 1.001, 1.01
"""Factors by which rounding may raise a gradient norm above its bound; bf16 numbers have 8 significant bits."""


class Workspace:
    """Memory of one micro-batch of N tokens, shared by SAEs of the same shape."""

    def __init__(self, tokens: int, width: int, latents: int, k: int, use_bf16: bool, use_dense: bool) -> None:
        dtype = torch.bfloat16 if use_bf16 else torch.float32
        pairs = tokens * k
        self.owner: NativeStep | None = None
        rows = max(64, native.CHUNK_BYTES // (latents * dtype.itemsize))
        self.pre = torch.empty(min(rows, tokens), latents, dtype=dtype)
        self.dense = native.DenseWorkspace(latents, tokens, width, self.pre) if use_dense else None
        self.tensors: dict[str, Tensor | None] = {
            "x_enc": torch.empty(tokens, width, dtype=dtype),
            "x_norms": torch.empty(tokens),
            "values": torch.empty(tokens, k),
            "indices": torch.empty(tokens, k, dtype=torch.int32),
            "residual": torch.empty(tokens, width),
            "residual_copy": torch.empty(tokens, width, dtype=dtype) if use_bf16 else None,
            "grad_pre": torch.empty(tokens, k),
            "residual_norms": torch.empty(tokens),
            "residual_sum": torch.empty(width, dtype=torch.double),
            "residual_square": torch.empty(1, dtype=torch.double),
            "starts": torch.empty(latents + 1, dtype=torch.long),
            "pair_token": torch.empty(pairs, dtype=torch.int32),
            "pair_value": torch.empty(pairs),
            "pair_grad_pre": torch.empty(pairs),
        }

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        assert tensor is not None, name
        return tensor


@functools.lru_cache(maxsize=4)
def get_workspace(tokens: int, width: int, latents: int, k: int, use_bf16: bool, use_dense: bool) -> Workspace:
    """Return the shared workspace of this shape."""
    return Workspace(tokens, width, latents, k, use_bf16, use_dense)


class NativeStep(TrainStep):
    """Adam step of one TopK coder.

    ``use_bf16``: products in bf16, with fp32 sums, weights and moments. ``no_accumulation``: each step has one
    micro-batch on one rank, so its gradients are used in the update without being stored.
    """

    def __init__(self, coder: TopK, settings: OptimSettings, *, use_bf16: bool, no_accumulation: bool) -> None:
        self._coder, self._settings, self._use_bf16, self._no_accumulation = coder, settings, use_bf16, no_accumulation
        self._use_dense = use_bf16 and coder.num_latents <= dense_limit(use_bf16) * coder.k
        self._step_count = 0
        # Both have one row per latent; the coder's W_enc is a transposed view of the first.
        self._W = {"enc": coder.W_enc.detach().T, "dec": coder.W_dec.detach()}
        self._b = {"enc": coder.b_enc.detach(), "dec": coder.b_dec.detach()}
        self._moments = {
            f"{name}_{what}": torch.zeros_like(value)
            for what, value in (*self._W.items(), ("b", self._b["enc"]), ("b_dec", self._b["dec"]))
            for name in ("m", "v")
        }
        self._bf16_weights = {name: value.bfloat16() for name, value in self._W.items()} if use_bf16 else {}
        self._encoder_norms = self._W["enc"].norm(dim=1)
        grad_shapes = {} if no_accumulation else {**self._W, "b": self._b["enc"]}
        self._has_gradients = False
        self._grads = {f"g_{what}": torch.zeros_like(value) for what, value in grad_shapes.items()}
        self._g_b_dec_encoder = torch.zeros(coder.d_in, dtype=torch.double)
        self._squared_norm = torch.zeros(1, dtype=torch.double)
        self._g_b_dec = torch.zeros(coder.d_in, dtype=torch.double)
        self._step: native.SaetrainStep | None = None
        self._workspace: Workspace | None = None
        self._live_tensors: dict[str, Tensor] = {}
        self._extra_norm = 0.0
        self._norm_bound = 0.0
        self._norm_bound_sum = torch.zeros(1, dtype=torch.double)

    @classmethod
    def unsupported(cls, request: StepRequest) -> str | None:
        """Return why the C++ kernels cannot be used, or None."""
        limit = explain_kernel_limits(request)
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
        coder = self._coder
        loss_scale = 2 / (ctx.n_tokens * float(ctx.data_variance))
        step, work = self._prepare_step(x_ND.contiguous(), loss_scale)
        native.center_inputs(step, work["x_enc"], work["x_norms"])
        native.encode_topk(
            work["x_enc"], self._weights["enc"], self._b["enc"], work.pre, work["values"], work["indices"]
        )
        if work.dense is None:
            native.compute_residuals(step)
        else:
            native.compute_residuals_dense(step, self._weights["dec"], work["residual_copy"], work.dense, work.pre)
        losses = {"recon": (work["residual_square"] * (loss_scale / 2)).float()[0]}
        self._extra_norm = 0.0
        if coder.auxk_alpha and ctx.dead_mask is not None:
            losses["auxk"] = self._add_auxk(ctx)
        if not self._no_accumulation:
            self._run_latent_pass(native.ADD if self._has_gradients else native.STORE)
            self._has_gradients = True
            self._g_b_dec += self._g_b_dec_encoder - loss_scale * work["residual_sum"]
            # The norm of a sum of gradients, over micro-batches and ranks, is at most the sum of their norms.
            self._norm_bound_sum += self._loose_bound(step)
        return StepStats(
            fired=work["starts"].diff(),
            tokens=len(x_ND),
            losses=losses,
            residual_sum=work["residual_sum"].float(),
            residual_square=work["residual_square"].float()[0],
        )

    @property
    def _weights(self) -> Mapping[str, Tensor]:
        """Encoder and decoder weights in the dtype of the products."""
        return self._bf16_weights or self._W

    def _prepare_step(self, x_ND: Tensor, loss_scale: float) -> tuple[native.SaetrainStep, Workspace]:
        """Set up the arguments of the kernels for one micro-batch."""
        coder = self._coder
        shape = (len(x_ND), coder.d_in, coder.num_latents, coder.k)
        work = self._workspace = get_workspace(*shape, self._use_bf16, self._use_dense)
        work.owner = self
        names = dict(zip(native.LONG_FIELDS, shape, strict=True))
        step = self._step = native.SaetrainStep(
            **names, threads=torch.get_num_threads(), use_bf16=self._use_bf16, loss_scale=loss_scale
        )
        self._live_tensors = {"x": x_ND}
        native.set_pointers(
            step,
            x=x_ND,
            **work.tensors,
            **{f"W_{name}": value for name, value in self._W.items()},
            **{f"b_{name}": value for name, value in self._b.items()},
            **{f"W_{name}_bf16": value for name, value in self._bf16_weights.items()},
            **{name: value for name, value in self._moments.items() if not name.endswith("b_dec")},
            **self._grads,
            g_b_dec=self._g_b_dec_encoder,
            square=self._squared_norm,
        )
        return step, work

    def _current_step(self) -> tuple[native.SaetrainStep, Workspace]:
        assert self._step is not None
        assert self._workspace is not None
        assert self._workspace.owner is self or not self._no_accumulation, (
            "another SAE has used the workspace of this step"
        )
        return self._step, self._workspace

    def _add_auxk(self, ctx: StepContext) -> Tensor:
        """Pass AuxK's gradient rows of the dead latents to the kernels; return the weighted loss."""
        assert ctx.dead_mask is not None
        step, work = self._current_step()
        dead = DeadLatents.from_mask(ctx.dead_mask)
        grads = auxk_forward_backward(self._coder, self._weights, work["x_enc"], work["residual"], dead, ctx)
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
        return [*self._grads.values(), self._g_b_dec, self._norm_bound_sum]

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
        square = native.bound_squared_norm(step, grad_b_enc)
        direct = step.loss_scale * self._current_step()[1]["residual_sum"]
        through_encoder = float(grad_b_enc.abs() @ self._encoder_norms)
        return float((square + (float(direct.norm()) + through_encoder) ** 2) ** 0.5 + self._extra_norm)

    def _tight_bound(self, step: native.SaetrainStep) -> float:
        """Bound the norm of the micro-batch's gradient from singular values of the encoder input and the residual."""
        grad_b_enc = torch.empty(step.F)
        direct = step.loss_scale * self._current_step()[1]["residual_sum"]
        square = native.bound_squared_norm(step, grad_b_enc, self._gradient_inputs)
        exact = direct + (grad_b_enc.to(self._weights["enc"].dtype) @ self._weights["enc"]).double()
        return float(1.02 * (square + float(exact.pow(2).sum())) ** 0.5 + self._extra_norm)

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
        """The rows that the weight gradients sum, in the dtype of the products."""
        _, work = self._current_step()
        return {"enc": work["x_enc"], "dec": work["residual_copy" if self._use_bf16 else "residual"]}

    def _gradient_norm(self) -> float:
        return float(self._squared_norm[0] + self._b_dec_gradient().pow(2).sum()) ** 0.5

    def _b_dec_gradient(self) -> Tensor:
        """Return the gradient of ``b_dec`` through decoder and encoder, (D,) fp64."""
        step, work = self._current_step()
        return (
            self._g_b_dec_encoder - step.loss_scale * work["residual_sum"] if self._no_accumulation else self._g_b_dec
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
        self._g_b_dec.zero_()
        self._norm_bound_sum.zero_()
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

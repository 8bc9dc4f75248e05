"""The TopK step on a CPU by the C++ kernels: gradients never touch memory unless micro-batches have to add up."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.kernels import native
from saetrain.kernels.processor import dense_limit
from saetrain.optim import BETAS, ENCODER_SHARE, EPS, OptimSettings
from saetrain.training.auxk import DeadLatents, auxk_step
from saetrain.training.engine import Engine, MicroStep, Objective, adam_state
from saetrain.types import StepContext

MARGIN, MARGIN_HALF = 1.001, 1.01
"""What rounding may add to a gradient over the bound from exact norms: rows, codes and sums are of 8 bits in bf16."""


class Workspace:
    """Memory of one micro-batch of N tokens, which SAEs of one shape use in turn."""

    def __init__(self, tokens: int, width: int, latents: int, k: int, half: bool, dense: bool) -> None:
        dtype = torch.bfloat16 if half else torch.float32
        pairs = tokens * k
        self.owner: NativeEngine | None = None
        rows = max(64, native.CHUNK_BYTES // (latents * dtype.itemsize))
        self.pre = torch.empty(min(rows, tokens), latents, dtype=dtype)
        self.dense = native.Dense(latents, tokens, width, self.pre) if dense else None
        self.tensors: dict[str, Tensor | None] = {
            "x_enc": torch.empty(tokens, width, dtype=dtype),
            "x_norms": torch.empty(tokens),
            "values": torch.empty(tokens, k),
            "indices": torch.empty(tokens, k, dtype=torch.int32),
            "residual": torch.empty(tokens, width),
            "residual_copy": torch.empty(tokens, width, dtype=dtype) if half else None,
            "dz": torch.empty(tokens, k),
            "residual_norms": torch.empty(tokens),
            "residual_sum": torch.empty(width, dtype=torch.double),
            "residual_square": torch.empty(1, dtype=torch.double),
            "starts": torch.empty(latents + 1, dtype=torch.long),
            "pair_token": torch.empty(pairs, dtype=torch.int32),
            "pair_value": torch.empty(pairs),
            "pair_dz": torch.empty(pairs),
        }

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        assert tensor is not None, name
        return tensor


@functools.lru_cache(maxsize=4)
def workspace(tokens: int, width: int, latents: int, k: int, half: bool, dense: bool) -> Workspace:
    """The one of this shape."""
    return Workspace(tokens, width, latents, k, half, dense)


class NativeEngine(Engine):
    """Adam over one TopK coder.

    ``half``: products in bf16, with fp32 sums, weights and moments. ``fused``: a step has one micro-batch on one rank,
    so its gradients can go straight into the update.
    """

    def __init__(self, coder: TopK, settings: OptimSettings, *, half: bool, fused: bool) -> None:
        self._coder, self._settings, self._half, self._fused = coder, settings, half, fused
        self._dense = half and coder.num_latents <= dense_limit(half) * coder.k
        self._step_count = 0
        # Both stored one latent after the other; the coder's W_enc is a transposed view of the first.
        self._W = {"enc": coder.W_enc.detach().T, "dec": coder.W_dec.detach()}
        self._b = {"enc": coder.b_enc.detach(), "dec": coder.b_dec.detach()}
        self._moments = {
            f"{name}_{what}": torch.zeros_like(value)
            for what, value in (*self._W.items(), ("b", self._b["enc"]), ("b_dec", self._b["dec"]))
            for name in ("m", "v")
        }
        self._halves = {name: value.bfloat16() for name, value in self._W.items()} if half else {}
        self._encoder_norms = self._W["enc"].norm(dim=1)
        stored = {} if fused else {**self._W, "b": self._b["enc"]}
        self._stored = False
        self._grads = {f"g_{what}": torch.zeros_like(value) for what, value in stored.items()}
        self._through = torch.zeros(coder.d_in, dtype=torch.double)
        self._square = torch.zeros(1, dtype=torch.double)
        self._g_b_dec = torch.zeros(coder.d_in, dtype=torch.double)
        self._step: native.Step | None = None
        self._work: Workspace | None = None
        self._kept: dict[str, Tensor] = {}
        self._extra_norm = 0.0
        self._bound = 0.0
        self._bounds = torch.zeros(1, dtype=torch.double)

    def micro_step(self, x_ND: Tensor, progress: StepContext, objective: Objective | None = None) -> MicroStep:
        """Top-k, decode and latent gradients; the weights' gradients too where they have to add up."""
        assert objective is None, "gradients are written out for the coder's own loss alone"
        coder = self._coder
        scale = 2 / (progress.n_tokens * float(progress.data_variance))
        step, work = self._begin(x_ND.contiguous(), scale)
        native.center(step, work["x_enc"], work["x_norms"])
        native.topk_relu(work["x_enc"], self._weights["enc"], self._b["enc"], work.pre, work["values"], work["indices"])
        if work.dense is None:
            native.reconstruct(step)
        else:
            native.reconstruct_dense(step, self._weights["dec"], work["residual_copy"], work.dense, work.pre)
        losses = {"recon": (work["residual_square"] * (scale / 2)).float()[0]}
        self._extra_norm = 0.0
        if coder.auxk_alpha and progress.dead_mask is not None:
            losses["auxk"] = self._auxk(progress)
        if not self._fused:
            self._latents(native.ADD if self._stored else native.STORE)
            self._stored = True
            self._g_b_dec += self._through - scale * work["residual_sum"]
            # No sum of gradients is longer than their lengths together, whatever rank they come from.
            self._bounds += self._loose_bound(step)
        return MicroStep(
            fired=work["starts"].diff(),
            tokens=len(x_ND),
            losses=losses,
            residual_sum=work["residual_sum"].float(),
            residual_square=work["residual_square"].float()[0],
        )

    @property
    def _weights(self) -> Mapping[str, Tensor]:
        """Encoder and decoder as the products take them."""
        return self._halves or self._W

    def _begin(self, x_ND: Tensor, scale: float) -> tuple[native.Step, Workspace]:
        """The kernels' view of one micro-batch."""
        coder = self._coder
        shape = (len(x_ND), coder.d_in, coder.num_latents, coder.k)
        work = self._work = workspace(*shape, self._half, self._dense)
        work.owner = self
        names = dict(zip(native.LONGS, shape, strict=True))
        step = self._step = native.Step(**names, threads=torch.get_num_threads(), half=self._half, scale=scale)
        self._kept = {"x": x_ND}
        native.point(
            step,
            x=x_ND,
            **work.tensors,
            **{f"W_{name}": value for name, value in self._W.items()},
            **{f"b_{name}": value for name, value in self._b.items()},
            **{f"W_{name}_half": value for name, value in self._halves.items()},
            **{name: value for name, value in self._moments.items() if not name.endswith("b_dec")},
            **self._grads,
            g_b_dec=self._through,
            square=self._square,
        )
        return step, work

    def _here(self) -> tuple[native.Step, Workspace]:
        assert self._step is not None
        assert self._work is not None
        assert self._work.owner is self or not self._fused, "another SAE has used the memory of this step"
        return self._step, self._work

    def _auxk(self, progress: StepContext) -> Tensor:
        """Hand AuxK's gradient rows of the dead latents to the kernels; gives the weighted loss."""
        assert progress.dead_mask is not None
        step, work = self._here()
        dead = DeadLatents.of(progress.dead_mask)
        found = auxk_step(self._coder, self._weights, work["x_enc"], work["residual"], dead, progress)
        rows = dead.places(self._coder.num_latents)
        extra = {"extra_row": rows, "extra_enc": found.W_enc, "extra_dec": found.W_dec, "extra_b": found.b_enc}
        self._kept.update(extra)
        native.point(step, **extra)
        self._extra_norm = float(sum(value.pow(2).sum() for value in (found.W_enc, found.W_dec, found.b_enc))) ** 0.5
        return found.loss

    def _latents(self, mode: int) -> None:
        """Run the latents' pass over the micro-batch, or over the gradients in memory."""
        step, work = self._here()
        self._square.zero_()
        stored = not self._fused and mode in (native.MEASURE, native.UPDATE)
        if not stored:
            self._through.zero_()
        if work.dense is None or stored:
            native.latents(step, mode, self._encoder_norms, stored=stored)
            return
        native.latents_dense(step, mode, self._encoder_norms, self._inputs, work.dense)

    def gradients(self) -> list[Tensor]:
        """Those in memory."""
        assert not self._fused, "a fused step keeps no gradients"
        return [*self._grads.values(), self._g_b_dec, self._bounds]

    def norm_bound(self) -> float:
        """Cheap from norms alone, and where that does not rule out clipping a tighter one, or the norm itself."""
        step, _ = self._here()
        bound = self._loose_bound(step) if self._fused else float(self._bounds[0])
        if self._too_long(bound) and math.isfinite(bound):
            bound = min(bound, self._tight_bound(step)) if self._fused else self._measured()
        self._bound = bound
        return bound

    def _loose_bound(self, step: native.Step) -> float:
        """Of the micro-batch's gradient, from norms alone."""
        bias = torch.empty(step.F)
        square = native.square_bound(step, bias)
        direct = step.scale * self._here()[1]["residual_sum"]
        through = float(bias.abs() @ self._encoder_norms)
        return float((square + (float(direct.norm()) + through) ** 2) ** 0.5 + self._extra_norm)

    def _tight_bound(self, step: native.Step) -> float:
        """The same, from the singular values of what the gradients are sums of."""
        bias = torch.empty(step.F)
        direct = step.scale * self._here()[1]["residual_sum"]
        square = native.square_bound(step, bias, self._inputs)
        exact = direct + (bias.to(self._weights["enc"].dtype) @ self._weights["enc"]).double()
        return float(1.02 * (square + float(exact.pow(2).sum())) ** 0.5 + self._extra_norm)

    def _measured(self) -> float:
        """The norm itself, by a pass over the gradients."""
        self._latents(native.MEASURE)
        return self._norm()

    def _too_long(self, bound: float) -> bool:
        """Whether a gradient of at most this norm may have to be clipped."""
        limit = self._settings.max_grad_norm
        return limit > 0 and (MARGIN_HALF if self._half else MARGIN) * bound > limit

    @property
    def _inputs(self) -> dict[str, Tensor]:
        """What the gradients' rows are sums of, in the products' format."""
        _, work = self._here()
        return {"enc": work["x_enc"], "dec": work["residual_copy" if self._half else "residual"]}

    def _norm(self) -> float:
        return float(self._square[0] + self._b_dec_gradient().pow(2).sum()) ** 0.5

    def _b_dec_gradient(self) -> Tensor:
        """Through the decoder and through the encoder, (D,) fp64."""
        step, work = self._here()
        return self._through - step.scale * work["residual_sum"] if self._fused else self._g_b_dec

    def apply(self, lr: float) -> Tensor:
        """Fused: gradients, projection, clipping, Adam and renormalisation in one pass over the latents."""
        step, _ = self._here()
        self._step_count += 1
        beta1, beta2 = BETAS
        step.lr, step.encoder_lr, step.decay = lr, ENCODER_SHARE * lr, self._settings.decay
        step.beta1, step.beta2, step.eps = beta1, beta2, EPS
        step.correction1 = 1 - beta1**self._step_count
        step.correction2 = (1 - beta2**self._step_count) ** 0.5
        step.clip, norm, limit = 1.0, self._bound, self._settings.max_grad_norm
        if self._too_long(self._bound):
            if self._fused:
                norm = self._measured()
            step.clip = min(1.0, limit / (norm + 1e-6))
        self._latents(native.UPDATE)
        norm = self._norm()
        self._update_b_dec(self._b_dec_gradient().float() * step.clip, step)
        self.drop()
        return torch.tensor(norm)

    def _update_b_dec(self, gradient: Tensor, step: native.Step) -> None:
        m, v = self._moments["m_b_dec"], self._moments["v_b_dec"]
        m.lerp_(gradient, 1 - step.beta1)
        v.mul_(step.beta2).addcmul_(gradient, gradient, value=1 - step.beta2)
        length = v.sqrt() / step.correction2 + step.eps
        self._b["dec"].addcdiv_(m, length, value=-step.lr / step.correction1)

    def drop(self) -> None:
        """Forget gradients and the micro-batch."""
        self._stored = False
        self._g_b_dec.zero_()
        self._bounds.zero_()
        self._step, self._work, self._kept = None, None, {}

    def state(self) -> dict[str, Tensor]:
        """As torch's Adam names it, the encoder's moments in the shape of ``W_enc`` (D, F)."""
        return adam_state(self._moments, torch.tensor(float(self._step_count)))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back moments and count, and copy the coder's weights anew."""
        own = self.state()
        for name, value in state.items():
            own[name].copy_(value)
        self._step_count = int(state["W_dec.step"])
        for name, copy in self._halves.items():
            copy.copy_(self._W[name])
        self._encoder_norms = self._W["enc"].norm(dim=1)

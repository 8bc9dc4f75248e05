"""The TopK step by Triton's kernels: no gradient is in memory unless it has to be, and no step asks the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.kernels import gpu, gpu_step
from saetrain.kernels.graphs import Recorded
from saetrain.optim import BETAS, ENCODER_SHARE, EPS, OptimSettings
from saetrain.training.auxk import DeadLatents, auxk_step
from saetrain.training.engine import DeviceEngine, MicroStep, Objective, adam_state
from saetrain.types import StepContext

MARGIN = 1.01
"""What rounding may add to a gradient over the bound from norms."""
DENSE = 128
"""Up to so many latents for each active one, dense products take less time: they read memory in order."""
RECORDED_WORK = 4 << 33
"""Tokens x width x latents up to which launches take as long as what they launch, so that a graph pays."""


@dataclass
class Batch:
    """What the update needs of a micro-batch.

    ``pairs``, ``parts``, ``x``, ``residual`` and ``scale``: what gradient rows are summed from, and ``extra`` {`row`,
    `enc`, `dec`} further rows (AuxK); or ``grads`` {`enc`, `dec`}, the gradients themselves.
    """

    x: Tensor
    scale: Tensor
    residual: Tensor
    pairs: gpu_step.Pairs | None = None
    parts: tuple[Tensor, Tensor] | None = None
    grads: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Found:
    """A micro-batch's gradients, small ones and the whole norm's bound as they are, with its sums over tokens."""

    batch: Batch
    residual: Tensor
    bias: Tensor
    b_dec: Tensor
    bound: Tensor
    step: MicroStep


class TritonEngine(DeviceEngine):
    """Adam over one TopK coder.

    ``half``: products in bf16, with fp32 sums, weights and moments. ``fused``: a step has one micro-batch on one rank,
    so its gradients can go straight into the update. ``products``: how gradients are summed, by default as F / k says;
    ``recorded``: whether launches are recorded as CUDA graphs, by default where they dominate.
    """

    def __init__(
        self,
        coder: TopK,
        settings: OptimSettings,
        *,
        half: bool,
        fused: bool,
        products: Literal["auto", "sparse", "dense"] = "auto",
        recorded: bool | None = None,
    ) -> None:
        self._coder, self._settings, self._half, self._fused = coder, settings, half, fused
        self._dense = coder.num_latents <= DENSE * coder.k if products == "auto" else products == "dense"
        self._record, self._computing, self._updating = recorded, Recorded[Found](), Recorded[Tensor]()
        # Both stored one latent after the other; the coder's W_enc is a transposed view of the first.
        self._W = {"enc": coder.W_enc.detach().T, "dec": coder.W_dec.detach()}
        self._b = {"enc": coder.b_enc.detach(), "dec": coder.b_dec.detach()}
        assert all(value.is_contiguous() for value in self._W.values()), "weights lie one latent after the other"
        whole = {**self._W, "b": self._b["enc"], "b_dec": self._b["dec"]}
        self._moments = {f"{name}_{what}": torch.zeros_like(whole[what]) for what in whole for name in ("m", "v")}
        self._halves = {name: value.bfloat16() for name, value in self._W.items()} if half else {}
        self._sums = {} if fused else {name: torch.zeros_like(value) for name, value in self._W.items()}
        zeros = self._b["dec"].new_zeros
        self._bias, self._g_b_dec, self._bound = zeros(coder.num_latents), zeros(coder.d_in), zeros(())
        self._squares = zeros(coder.num_latents)
        self._count, self._lr = zeros((), dtype=torch.float64), zeros((), dtype=torch.float64)
        self._always = zeros((), dtype=torch.bool).logical_not()
        self._batch: Batch | None = None
        self._about: StepContext | None = None
        self._empty, self._replayed = True, False

    @property
    def _weights(self) -> Mapping[str, Tensor]:
        """Encoder and decoder as the products take them."""
        return self._halves or self._W

    @torch.no_grad()
    def micro_step(self, x_ND: Tensor, progress: StepContext, objective: Objective | None = None) -> MicroStep:
        """Top-k, decode and latent gradients; the weights' gradients too where they have to add up."""
        assert objective is None, "gradients are written out for the coder's own loss alone"
        self._about, x_ND = progress, x_ND.contiguous()
        self._replayed = self._may_replay(x_ND, progress)
        given = x_ND, progress.data_variance
        found = self._computing(self._compute, *given) if self._replayed else self._compute(*given)
        self._batch = found.batch
        if self._coder.auxk_alpha and progress.dead_mask is not None:
            self._auxk(found, progress)
        self._add(found)
        return found.step

    def _may_replay(self, x_ND: Tensor, progress: StepContext) -> bool:
        """Whether every step launches the same, which must be known without a look at the device."""
        if not self._fused or not x_ND.is_cuda or progress.dead_mask is not None or not self._computing.fits(x_ND):
            return False
        return x_ND.numel() * self._coder.num_latents <= RECORDED_WORK if self._record is None else self._record

    def _compute(self, x_ND: Tensor, variance: Tensor) -> Found:
        assert self._about is not None
        coder, weights = self._coder, self._weights
        centred = x_ND - self._b["dec"]
        encoded = centred.to(weights["enc"].dtype)
        values, indices = gpu_step.topk_relu(encoded, weights["enc"], self._b["enc"], coder.k)
        scale = 2 / (self._about.n_tokens * variance)
        by = self._by_products if self._dense else self._by_pairs
        batch, residual, bias, square, fired = by(centred, encoded, values, indices, scale)
        residual_sum = residual.sum(dim=0)
        b_dec = -(scale * residual_sum + (bias.to(weights["enc"].dtype) @ weights["enc"]).float())
        residual_square = residual.square().sum()
        step = MicroStep(fired, len(x_ND), {"recon": residual_square * (scale / 2)}, residual_sum, residual_square)
        return Found(batch, residual, bias, b_dec, (square + b_dec.square().sum()).sqrt(), step)

    def _by_pairs(
        self, centred: Tensor, encoded: Tensor, values: Tensor, indices: Tensor, scale: Tensor
    ) -> tuple[Batch, Tensor, Tensor, Tensor, Tensor]:
        """Sparse: (batch, residual, gradient of b_enc, bound on the others' squared norm with it, firings)."""
        residual, copy, slopes, norms = gpu_step.reconstruct(centred, self._weights["dec"], values, indices, scale)
        pairs = gpu_step.sort_pairs(values, indices, slopes, self._coder.num_latents)
        bias, squares = gpu_step.bounds(pairs, torch.linalg.vector_norm(centred, dim=1), norms, scale)
        batch = Batch(encoded, scale, copy, pairs, gpu_step.parts(pairs, encoded, copy, scale))
        return batch, residual, bias, squares.sum(), pairs.starts.diff()

    def _by_products(
        self, centred: Tensor, encoded: Tensor, values: Tensor, indices: Tensor, scale: Tensor
    ) -> tuple[Batch, Tensor, Tensor, Tensor, Tensor]:
        """The same through the whole code."""
        W_dec = self._weights["dec"]
        code = encoded.new_zeros(len(values), self._coder.num_latents)
        code.scatter_(1, indices.long(), values.to(code.dtype))
        active = code > 0
        residual = centred - (code @ W_dec).float()
        scaled = (residual * -scale).to(code.dtype)
        latent = (scaled @ W_dec.T).mul_(active)
        grads = {"enc": (latent.T @ encoded).float(), "dec": (code.T @ scaled).float()}
        bias = latent.sum(dim=0, dtype=torch.float32)
        square = torch.stack([each.square().sum() for each in (*grads.values(), bias)]).sum()
        return Batch(encoded, scale, residual, grads=grads), residual, bias, square, active.sum(dim=0)

    def _auxk(self, found: Found, progress: StepContext) -> None:
        """Put AuxK's loss and its gradient rows to the others."""
        assert progress.dead_mask is not None
        batch, latents = found.batch, self._coder.num_latents
        most = latents if progress.max_n_dead is None else progress.max_n_dead
        dead = DeadLatents.at_most(most, progress.dead_mask)
        aux = auxk_step(self._coder, self._weights, batch.x, found.residual, dead, progress)
        found.step.losses["auxk"] = aux.loss
        place = dead.places(latents)
        found.bias += _spread(aux.b_enc, place)
        if self._dense:
            batch.grads["enc"] += _spread(aux.W_enc, place)
            batch.grads["dec"] += _spread(aux.W_dec, place)
        else:
            batch.extra = {"row": place, "enc": aux.W_enc.contiguous(), "dec": aux.W_dec.contiguous()}
        norm = torch.stack([value.square().sum() for value in (aux.W_enc, aux.W_dec, aux.b_enc)]).sum().sqrt()
        found.bound = found.bound + norm

    def _add(self, found: Found) -> None:
        """Take the micro-batch's small gradients, and unless it is alone its rows too."""
        if not self._fused and self._dense:
            for name, value in found.batch.grads.items():
                if self._empty:
                    self._sums[name].copy_(value)
                else:
                    self._sums[name].add_(value)
        elif not self._fused:
            self._latents(gpu.STORE if self._empty else gpu.ADD, self._always)
        # No sum of gradients is longer than their lengths together, whatever rank they come from.
        self._bound = found.bound if self._empty else self._bound + found.bound
        self._bias = found.bias if self._empty else self._bias + found.bias
        self._g_b_dec = found.b_dec if self._empty else self._g_b_dec + found.b_dec
        self._empty = False

    def _latents(self, mode: int, gate: Tensor, rates: Tensor | None = None, clip: Tensor | None = None) -> None:
        """Run the latents' pass over the micro-batch, or over the gradients in memory, unless ``gate`` is false."""
        batch, W = self._batch, self._W
        assert batch is not None
        extra, width, unused = batch.extra, self._coder.d_in, self._squares
        grads = self._sums or batch.grads
        stored = bool(grads) and mode in (gpu.MEASURE, gpu.UPDATE)
        pairs = (unused,) * 7
        if batch.pairs is not None and batch.parts is not None:
            p = batch.pairs
            pairs = (p.starts, p.token, p.value, p.slope, p.segments, *batch.parts)
        gpu.latents[(self._coder.num_latents,)](
            gate.int(), *pairs, batch.x, batch.residual, batch.scale,
            extra.get("row", unused), extra.get("enc", unused), extra.get("dec", unused),
            self._bias, grads.get("enc", unused), grads.get("dec", unused),
            W["enc"], W["dec"], self._b["enc"], self._weights["enc"], self._weights["dec"],
            *(self._moments[name] for name in ("m_enc", "v_enc", "m_dec", "v_dec", "m_b", "v_b")),
            self._squares, unused if rates is None else rates, unused if clip is None else clip, width,
            BETA1=BETAS[0], BETA2=BETAS[1], EPS=EPS, MODE=mode, STORED=stored, EXTRA=bool(extra),
            HALF=self._half, BLOCK_P=gpu_step.rows_at_once(width), **gpu_step.over_rows(width),
        )  # fmt: skip

    def gradients(self) -> list[Tensor]:
        """Those in memory."""
        assert not self._fused, "a fused step keeps no gradients"
        return [self._sums["enc"], self._sums["dec"], self._bias, self._g_b_dec, self._bound]

    def norm_bound(self) -> Tensor:
        """From norms alone."""
        return self._bound

    @torch.no_grad()
    def apply(self, lr: float, gate: Tensor | None = None) -> Tensor:
        """Gradients, projection, clipping, Adam and renormalisation; a gradient that is not finite changes nothing."""
        self._lr.fill_(lr)
        gate = self._always if gate is None else gate
        norm = self._updating(self._update, gate) if self._replayed else self._update(gate)
        self.drop()
        return norm

    def _update(self, gate: Tensor) -> Tensor:
        limit = self._settings.max_grad_norm
        fine = self._bound.isfinite() & gate
        self._count += fine
        clip, b_dec_square = torch.ones_like(self._bound), self._g_b_dec.square().sum()
        if limit > 0:
            long = fine & (MARGIN * self._bound > limit)
            # Cheap norms nearly always rule out clipping; the kernel returns at once where they do.
            self._latents(gpu.MEASURE, long)
            norm = torch.where(long, (self._squares.sum() + b_dec_square).sqrt(), self._bound)
            clip = torch.where(long, (limit / (norm + 1e-6)).clamp_max(1.0), 1.0)
        first, second = (1 - beta**self._count for beta in BETAS)
        keep = 1 - self._lr * (ENCODER_SHARE * self._settings.decay)
        rates = torch.stack([self._lr / first, ENCODER_SHARE * self._lr / first, keep, second.rsqrt()]).float()
        self._latents(gpu.UPDATE, fine, rates, clip)
        self._update_b_dec(fine, self._g_b_dec * clip, rates)
        return (self._squares.sum() + b_dec_square).sqrt()

    def _update_b_dec(self, fine: Tensor, gradient: Tensor, rates: Tensor) -> None:
        m, v, b = self._moments["m_b_dec"], self._moments["v_b_dec"], self._b["dec"]
        first = m.lerp(gradient, 1 - BETAS[0])
        second = BETAS[1] * v + (1 - BETAS[1]) * gradient.square()
        moved = b - rates[0] * first / (second.sqrt() * rates[3] + EPS)
        for own, new in ((m, first), (v, second), (b, moved)):
            own.copy_(torch.where(fine, new, own))

    def drop(self) -> None:
        """Forget gradients and the micro-batch."""
        self._batch, self._empty = None, True

    def state(self) -> dict[str, Tensor]:
        """As torch's Adam names it, the encoder's moments in the shape of ``W_enc`` (D, F)."""
        return adam_state(self._moments, self._count.float().cpu())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back moments and count, and copy the coder's weights anew."""
        own = self.state()
        for name, value in state.items():
            own[name].copy_(value)
        self._count.copy_(state["W_dec.step"])
        for name, copy in self._halves.items():
            copy.copy_(self._W[name])


def _spread(rows: Tensor, place: Tensor) -> Tensor:
    """``rows`` at their places, 0 where the place is -1; by reading, for adding at places is atomic on a GPU."""
    # The last of these is what -1 names.
    return torch.cat([rows, torch.zeros_like(rows[:1])])[place]

"""The TopK step by Triton's kernels: no gradient is in memory unless micro-batches have to add up, and no step waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.kernels import gpu, gpu_step
from saetrain.optim import BETAS, ENCODER_SHARE, EPS, OptimSettings
from saetrain.training.auxk import auxk_step
from saetrain.training.engine import Engine, MicroStep, Objective
from saetrain.types import Progress

MARGIN = 1.01
"""What rounding may add to a gradient over the bound from norms."""


@dataclass
class Batch:
    """What the update needs of a micro-batch; ``extra`` {`row`, `enc`, `dec`} further gradient rows (AuxK)."""

    pairs: gpu_step.Pairs
    x: Tensor
    residual: Tensor
    scale: Tensor
    parts: tuple[Tensor, Tensor]
    extra: dict[str, Tensor]


class TritonEngine(Engine):
    """Adam over one TopK coder.

    ``half``: products in bf16, with fp32 sums, weights and moments. ``fused``: a step has one micro-batch on one rank,
    so its gradients can go straight into the update.
    """

    def __init__(self, coder: TopK, settings: OptimSettings, *, half: bool, fused: bool) -> None:
        self._coder, self._settings, self._half, self._fused = coder, settings, half, fused
        self._steps = 0
        # Both stored one latent after the other; the coder's W_enc is a transposed view of the first.
        self._W = {"enc": coder.W_enc.detach().T, "dec": coder.W_dec.detach()}
        self._b = {"enc": coder.b_enc.detach(), "dec": coder.b_dec.detach()}
        assert all(value.is_contiguous() for value in self._W.values()), "weights lie one latent after the other"
        whole = {**self._W, "b": self._b["enc"], "b_dec": self._b["dec"]}
        self._moments = {f"{name}_{what}": torch.zeros_like(whole[what]) for what in whole for name in ("m", "v")}
        self._halves = {name: value.bfloat16() for name, value in self._W.items()} if half else {}
        # Fused, the kernels are handed something that they never touch.
        self._grads = dict(self._W) if fused else {name: torch.zeros_like(value) for name, value in self._W.items()}
        zero = self._b["dec"].new_zeros
        self._bias, self._g_b_dec, self._bound = zero(coder.num_latents), zero(coder.d_in), zero(())
        self._squares = zero(coder.num_latents)
        self._batch: Batch | None = None
        self._empty = True

    @property
    def _weights(self) -> Mapping[str, Tensor]:
        """Encoder and decoder as the products take them."""
        return self._halves or self._W

    @torch.no_grad()
    def micro_step(self, x_ND: Tensor, progress: Progress, objective: Objective | None = None) -> MicroStep:
        """Top-k, decode and latent gradients; the weights' gradients too where they have to add up."""
        assert objective is None, "gradients are written out for the coder's own loss alone"
        coder, weights, x_ND = self._coder, self._weights, x_ND.contiguous()
        centred = x_ND - self._b["dec"]
        encoded = centred.to(weights["enc"].dtype)
        values, indices = gpu_step.topk_relu(encoded, weights["enc"], self._b["enc"], coder.k)
        scale = 2 / (progress.n_tokens * progress.data_variance)
        residual, copy, slopes, norms = gpu_step.reconstruct(
            x_ND, self._b["dec"], weights["dec"], values, indices, scale
        )
        pairs = gpu_step.sort_pairs(values, indices, slopes, coder.num_latents)
        bias, squares = gpu_step.bounds(pairs, torch.linalg.vector_norm(centred, dim=1), norms, scale)
        residual_sum, square = residual.sum(dim=0), norms.square().sum()
        direct = -(scale * residual_sum + (bias.to(weights["enc"].dtype) @ weights["enc"]).float())
        self._batch = Batch(pairs, encoded, copy, scale, gpu_step.parts(pairs, encoded, copy, scale), {})
        bound = squares.sum() + direct.square().sum()
        losses = {"recon": square * (scale / 2)}
        if coder.auxk_alpha and progress.dead is not None:
            losses["auxk"], further = self._auxk(residual, bias, progress)
            bound = (bound.sqrt() + further).square()
        self._add(bias, direct, bound)
        return MicroStep(pairs.starts.diff(), len(x_ND), losses, residual_sum, square)

    def _auxk(self, residual_ND: Tensor, bias_F: Tensor, progress: Progress) -> tuple[Tensor, Tensor]:
        """Keep AuxK's gradient rows for the kernels; gives the weighted loss and the rows' norm."""
        assert progress.dead is not None
        assert self._batch is not None
        # Which latents are dead is a shape, so this asks the device.
        dead = progress.dead.nonzero().squeeze(1)
        found = auxk_step(self._coder, self._weights, self._batch.x, residual_ND, dead, progress)
        rows = torch.full_like(bias_F, -1, dtype=torch.int32)
        rows[dead] = torch.arange(len(dead), dtype=torch.int32, device=dead.device)
        bias_F.index_add_(0, dead, found.b_enc)
        self._batch.extra = {"row": rows, "enc": found.W_enc.contiguous(), "dec": found.W_dec.contiguous()}
        norm = torch.stack([value.square().sum() for value in (found.W_enc, found.W_dec, found.b_enc)]).sum().sqrt()
        return found.loss, norm

    def _add(self, bias: Tensor, direct: Tensor, bound: Tensor) -> None:
        """Take the micro-batch's small gradients, and unless it is alone its rows too."""
        if not self._fused:
            self._latents(gpu.STORE if self._empty else gpu.ADD, torch.ones_like(bias, dtype=torch.int32)[0], bias)
        # No sum of gradients is longer than their lengths together, whatever rank they come from.
        self._bound = bound.sqrt() if self._empty else self._bound + bound.sqrt()
        self._bias = bias if self._empty else self._bias + bias
        self._g_b_dec = direct if self._empty else self._g_b_dec + direct
        self._empty = False

    def _latents(
        self, mode: int, gate: Tensor, bias: Tensor, rates: Tensor | None = None, clip: Tensor | None = None
    ) -> None:
        """Run the latents' pass over the micro-batch, or over the gradients in memory, unless ``gate`` is 0."""
        batch, W = self._batch, self._W
        assert batch is not None
        pairs, extra, unused = batch.pairs, batch.extra, self._squares
        width = self._coder.d_in
        gpu.latents[(self._coder.num_latents,)](
            gate, pairs.starts, pairs.token, pairs.value, pairs.slope, pairs.segments, *batch.parts,
            batch.x, batch.residual, batch.scale,
            extra.get("row", unused), extra.get("enc", unused), extra.get("dec", unused),
            bias, self._grads["enc"], self._grads["dec"],
            W["enc"], W["dec"], self._b["enc"], self._weights["enc"], self._weights["dec"],
            *(self._moments[name] for name in ("m_enc", "v_enc", "m_dec", "v_dec", "m_b", "v_b")),
            self._squares, unused if rates is None else rates, unused if clip is None else clip, width,
            MODE=mode, STORED=not self._fused and mode in (gpu.MEASURE, gpu.UPDATE), EXTRA=bool(extra),
            HALF=self._half, BLOCK_D=gpu_step.power(width), BLOCK_P=gpu_step.rows_at_once(width),
        )  # fmt: skip

    def gradients(self) -> list[Tensor]:
        """Those in memory."""
        assert not self._fused, "a fused step keeps no gradients"
        return [self._grads["enc"], self._grads["dec"], self._bias, self._g_b_dec, self._bound]

    def norm_bound(self) -> float:
        """From norms alone."""
        return float(self._bound)

    @torch.no_grad()
    def apply(self, lr: float) -> Tensor:
        """Gradients, projection, clipping, Adam and renormalisation; a gradient that is not finite changes nothing."""
        self._steps += 1
        limit = self._settings.max_grad_norm
        fine = self._bound.isfinite()
        clip, b_dec_square = torch.ones_like(self._bound), self._g_b_dec.square().sum()
        if limit > 0:
            long = fine & (MARGIN * self._bound > limit)
            # Cheap norms nearly always rule out clipping; the kernel returns at once where they do.
            self._latents(gpu.MEASURE, long.int(), self._bias)
            norm = torch.where(long, (self._squares.sum() + b_dec_square).sqrt(), self._bound)
            clip = torch.where(long, (limit / (norm + 1e-6)).clamp_max(1.0), 1.0)
        self._latents(gpu.UPDATE, fine.int(), self._bias, self._rates(lr), clip)
        norm = (self._squares.sum() + b_dec_square).sqrt()
        self._update_b_dec(torch.where(fine, self._g_b_dec * clip, 0.0), lr)
        self.drop()
        return norm

    def _rates(self, lr: float) -> Tensor:
        """What a step's update needs, on the device; the copy is not waited for."""
        (beta1, beta2), encoder = BETAS, ENCODER_SHARE * lr
        first, second = 1 - beta1**self._steps, 1 - beta2**self._steps
        keep = 1 - encoder * self._settings.decay
        rates = torch.tensor([lr / first, encoder / first, keep, second**-0.5, beta1, beta2, EPS])
        device = self._b["dec"].device
        return rates.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rates.to(device)

    def _update_b_dec(self, gradient: Tensor, lr: float) -> None:
        (beta1, beta2), m, v = BETAS, self._moments["m_b_dec"], self._moments["v_b_dec"]
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        length = v.sqrt() / (1 - beta2**self._steps) ** 0.5 + EPS
        self._b["dec"].addcdiv_(m, length, value=-lr / (1 - beta1**self._steps))

    def drop(self) -> None:
        """Forget gradients and the micro-batch."""
        self._batch, self._empty = None, True

    def state(self) -> dict[str, Tensor]:
        """As torch's Adam names it, the encoder's moments in the shape of ``W_enc`` (D, F)."""
        out = {}
        for parameter, what in (("W_enc", "enc"), ("W_dec", "dec"), ("b_enc", "b"), ("b_dec", "b_dec")):
            for key, name in (("exp_avg", "m"), ("exp_avg_sq", "v")):
                value = self._moments[f"{name}_{what}"]
                out[f"{parameter}.{key}"] = value.T if what == "enc" else value
            out[f"{parameter}.step"] = torch.tensor(float(self._steps))
        return out

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back moments and count, and copy the coder's weights anew."""
        own = self.state()
        for name, value in state.items():
            own[name].copy_(value)
        self._steps = int(state["W_dec.step"])
        for name, copy in self._halves.items():
            copy.copy_(self._W[name])

"""One SAE in training: coder, normalization, training step, firing counters and spike detector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from saetrain.coders.base import SparseCoder
from saetrain.distributed import GradientBuckets
from saetrain.training.dead_latents import DeadCountBound, FiringTracker
from saetrain.training.loss_spikes import DeviceSpikeDetector, LossSpike, SpikeDetector
from saetrain.training.steps.base import DeviceStep, MicroBatch, StepStats, TrainStep
from saetrain.types import Site, StepContext

DEVICE_LAG_STEPS = 2
"""Steps after which the host reads results of a device that it does not wait for."""


class SaeState:
    """One SAE (or other coder) in training.

    ``normalize_inputs`` and ``normalize_outputs`` map raw activations (N, D) of the site's inputs and outputs to coder
    inputs x and to what the coder reconstructs, y; SAEs with the same functions share the results. ``data_variance``
    is E‖y‖² of the latter, and ``mse_per_fvu`` the factor from FVU to the mean squared error per element in raw units.
    Each step adds ``dead_bias_lr_multiplier`` times the learning rate to the encoder bias of dead latents.
    ``stop_on_spike``: a loss spike ends the training of this SAE.
    """

    def __init__(
        self,
        site: Site,
        coder: SparseCoder,
        normalize_inputs: Callable[[Tensor], Tensor],
        normalize_outputs: Callable[[Tensor], Tensor],
        train_step: TrainStep,
        firing: FiringTracker,
        *,
        data_variance: float,
        mse_per_fvu: float,
        peak_lr: float,
        seed: int,
        dead_bias_lr_multiplier: float = 0.0,
        stop_on_spike: bool = True,
    ) -> None:
        device = coder.W_dec.device
        self.site, self.coder, self.seed = site, coder, seed
        self.normalize_inputs, self._normalize_outputs = normalize_inputs, normalize_outputs
        self.train_step, self.firing, self.peak_lr, self.mse_per_fvu = train_step, firing, peak_lr, mse_per_fvu
        self._dead_bias_lr_multiplier = dead_bias_lr_multiplier
        self.data_variance = torch.tensor(data_variance, device=device)
        self.residual_variance = self.data_variance.clone()
        self.stats: StepStats | None = None
        self._packed_stats: Tensor | None = None
        # A step that does not wait for the device detects spikes there, and the host reads the result later.
        runs_ahead = isinstance(train_step, DeviceStep)
        self._spike_detector = (
            DeviceSpikeDetector(device, DEVICE_LAG_STEPS, stop_on_spike=stop_on_spike)
            if runs_ahead
            else SpikeDetector()
        )
        needs_bound = runs_ahead and coder.uses_dead_latents
        self._dead_count_bound = DeadCountBound(firing, DEVICE_LAG_STEPS) if needs_bound else None
        self._min_residual_variance = 1e-6 * data_variance
        self.grad_norm = torch.zeros((), device=device)

    def forward_backward(self, batch: MicroBatch, ctx: StepContext) -> None:
        """Accumulate gradients and counts of one micro-batch."""
        n_tokens = ctx.n_tokens if batch.step_tokens is None else batch.step_tokens
        ctx = replace(ctx, n_tokens=n_tokens, groups=batch.groups)
        x_ND, y_ND = batch.normalize_once(self.normalize_inputs, batch.x_ND), None
        if batch.y_ND is not batch.x_ND:
            y_ND = batch.normalize_once(self._normalize_outputs, batch.y_ND)
        stats = self.train_step.forward_backward(x_ND, ctx, y_ND, batch.objective)
        self.stats = stats if self.stats is None else self.stats.merge_with(stats)

    def add_to_buckets(self, buckets: GradientBuckets) -> None:
        """Add the step's gradients and counts to ``buckets``, which sum them over the ranks."""
        assert self.stats is not None
        self._packed_stats = self.stats.pack_row()
        buckets.add([*self.train_step.gradients(), self._packed_stats])

    def unpack_reduced(self, tokens: int) -> None:
        """Read the counts summed over all ranks, which have ``tokens`` tokens together."""
        assert self.stats is not None
        assert self._packed_stats is not None
        known_tokens = tokens if isinstance(self.train_step, DeviceStep) else None
        self.stats, self._packed_stats = self.stats.unpack_row(self._packed_stats, known_tokens), None

    def build_context(self, step: int, tokens: int, total_steps: int) -> StepContext:
        """Return the inputs of the coder's loss for step ``step`` over ``tokens`` tokens."""
        bound = self._dead_count_bound
        max_dead = None if bound is None else bound.max_dead_count(tokens)
        dead = None
        if self.coder.uses_dead_latents:
            dead = (
                self.firing.dead_mask_or_none() if max_dead is None else self.firing.dead_mask() if max_dead else None
            )
        return StepContext(step, tokens, dead, self.data_variance, self.residual_variance, max_dead, total_steps)

    def step_unless_spike(self, name: str, lr: float, ctx: StepContext) -> None:
        """Apply the optimizer step, or skip it if its loss is a spike."""
        assert self.stats is not None
        step = ctx.step + 1
        loss, bound = torch.stack(list(self.stats.losses.values())).sum(), self.train_step.norm_bound()
        if isinstance(self._spike_detector, DeviceSpikeDetector):
            assert isinstance(self.train_step, DeviceStep)
            assert isinstance(bound, Tensor)
            ok = self._spike_detector.check_step(step, loss, bound)
            self._record_step(self.train_step.optimizer_step(lr, ok), lr, ok)
        elif self._spike_detector.check_step(name, step, float(loss), float(bound)):
            self._record_step(self.train_step.optimizer_step(lr), lr)
            self.coder.after_step(self.stats.sums, ctx)
        else:
            self.train_step.zero_grad()

    def pop_spikes(self, name: str, *, wait: bool) -> list[LossSpike]:
        """Return the spikes since the last call: those known by now, or with ``wait`` all of them."""
        return self._spike_detector.pop_spikes(name, wait=wait)

    def recent_losses(self) -> list[float]:
        """Return the losses in the running median."""
        return self._spike_detector.recent_losses()

    def zero_grad(self) -> None:
        """Discard the gradients of the current step."""
        self.train_step.zero_grad()

    def _record_step(self, norm: Tensor, lr: float, ok: Tensor | None = None) -> None:
        """Update firing counters, dead biases and the residual variance for the next step, unless ``ok`` is false."""
        assert self.stats is not None
        self.grad_norm = norm
        self.firing.count_micro_batch(self.stats.fired, self.stats.tokens)
        self.firing.finish_step(ok)
        if self._dead_count_bound is not None:
            self._dead_count_bound.update_after_step(self.stats.tokens)
        self._raise_dead_biases(lr, ok)
        tokens = max(self.stats.tokens, 1)
        mean = self.stats.residual_sum / tokens
        variance = self.stats.residual_square / tokens - mean.pow(2).sum()
        # The lower bound keeps losses finite that are divided by it, if the reconstruction is perfect.
        variance = variance.clamp_min(self._min_residual_variance)
        self.residual_variance = variance if ok is None else torch.where(ok, variance, self.residual_variance)

    @torch.no_grad()
    def _raise_dead_biases(self, lr: float, ok: Tensor | None) -> None:
        """Raise the encoder bias of latents that have not fired within the window, until they are among the top k."""
        if self._dead_bias_lr_multiplier:
            dead_mask = self.firing.dead_mask() if ok is None else self.firing.dead_mask() & ok
            self.coder.b_enc.add_(dead_mask, alpha=self._dead_bias_lr_multiplier * lr)

    def compute_metrics(self, loss_fn: str) -> dict[str, float]:
        """Return the metrics of the last step; each covers that step or a firing window, not the logging interval."""
        assert self.stats is not None
        unit = self.mse_per_fvu if loss_fn == "mse" else 1.0
        terms = {f"loss_{name}": float(value) * unit for name, value in self.stats.losses.items()}
        tokens = max(self.stats.tokens, 1)
        # With ce and kl, the term `recon` may be weighted or missing.
        mean_fvu = self.stats.residual_square / (tokens * self.data_variance)
        fvu = float(self.stats.losses["recon"] if loss_fn in ("mse", "fvu") else mean_fvu)
        return {
            "loss": sum(terms.values()),
            **terms,
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "l0": float(self.stats.fired.sum()) / tokens,
            **self.firing.compute_metrics(),
            "grad_norm": float(self.grad_norm),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that training changes, as tensors, for a checkpoint."""
        return {
            **{f"coder.{name}": value.detach() for name, value in self.coder.state_dict(keep_vars=True).items()},
            **{f"optimizer.{name}": value for name, value in self.train_step.state_dict().items()},
            **{f"firing.{name}": value for name, value in self.firing.state_dict().items()},
            "residual_variance": self.residual_variance,
            **({} if self._dead_count_bound is None else {"dead_ahead": self._dead_count_bound.state_dict()}),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], recent_losses: list[float]) -> None:
        """Load the results of :meth:`state_dict` and :meth:`recent_losses`."""
        self._spike_detector.load_recent_losses(recent_losses)
        parts: dict[str, dict[str, Tensor]] = {"coder": {}, "optimizer": {}, "firing": {}}
        for name, value in state.items():
            if "." in name:
                head, rest = name.split(".", 1)
                parts[head][rest] = value
        for name, value in self.coder.state_dict(keep_vars=True).items():
            value.copy_(parts["coder"][name])
        self.train_step.load_state_dict(parts["optimizer"])
        self.firing.load_state_dict(parts["firing"])
        # A run that was started with other kernels has no such entry.
        if self._dead_count_bound is not None and "dead_ahead" in state:
            self._dead_count_bound.load_state_dict(state["dead_ahead"])
        self.residual_variance.copy_(state["residual_variance"])

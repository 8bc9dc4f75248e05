"""The optimizer step of several SAEs on shared activations, with gradient accumulation and data parallelism."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from saetrain.coders.base import SparseCoder
from saetrain.distributed import GradientBuckets, record_progress
from saetrain.errors import SaetrainError, is_out_of_memory
from saetrain.optim import lr_factor
from saetrain.training.dead_latents import DeadCountBound, FiringTracker
from saetrain.training.loss_spikes import DeviceSpikeDetector, LossSpike, SpikeDetector
from saetrain.training.steps.base import DeviceStep, SplicedBatch, StepStats, TrainStep
from saetrain.types import StepContext

MicroBatch = Mapping[str, Tensor] | Mapping[str, SplicedBatch]
"""{hookpoint: raw activations (N, D)}, or {hookpoint: activations with their own loss}."""

END_TO_END_LOSSES = ("ce", "kl")
"""Losses on the model's outputs with the SAE spliced in."""
DEVICE_LAG_STEPS = 2
"""Steps after which the host reads results of a device that it does not wait for."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Training: tokens, batch size and loss."""

    max_tokens: int = 1_000_000
    """Number of activations to train on, over all processes."""
    batch_size: int = 4
    """Size of a micro-batch per process, in sequences: it has batch_size x ctx_len activations."""
    grad_acc_steps: int = 1
    """Micro-batches per optimizer step."""
    loss_fn: Literal["mse", "fvu", "ce", "kl"] = "mse"
    """`mse`, `fvu`: reconstruction error; `ce`, `kl`: the model's loss with the SAE in it (docs/end_to_end.md)."""
    e2e_recon_weight: float = 0.0
    """With `ce` and `kl`: weight of the FVU that is added to the loss, in nats."""
    on_spike: Literal["stop", "skip"] = "stop"
    """Reaction to a loss that is not finite or above 100 times its running median: stop the run or skip the step."""
    init_seeds: tuple[int, ...] = (42,)
    """Seeds of the initial weights; each seed trains its own SAE in the same run."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size", "grad_acc_steps"):
            if getattr(self, name) < 1:
                raise SaetrainError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not self.init_seeds or min(self.init_seeds) < 0 or len(set(self.init_seeds)) != len(self.init_seeds):
            raise SaetrainError(
                f"--init_seeds {list(self.init_seeds)}: give one or more different numbers, each at least 0"
            )
        if not 0 <= self.e2e_recon_weight < float("inf"):
            raise SaetrainError(f"--e2e_recon_weight {self.e2e_recon_weight}: must not be negative")
        if self.e2e_recon_weight and not self.end_to_end:
            raise SaetrainError(
                f"--e2e_recon_weight {self.e2e_recon_weight}: works only with --loss_fn ce or kl; "
                f"{self.loss_fn} already minimizes the reconstruction error"
            )
        if self.end_to_end and len(self.init_seeds) > 1:
            raise SaetrainError(
                f"--loss_fn {self.loss_fn} with {len(self.init_seeds)} --init_seeds: each SAE needs its own forward "
                "and backward pass of the model, so the SAEs would share nothing; start one run per seed"
            )

    def suggest_smaller_batch(self) -> str:
        """Return the flags to lower after running out of memory."""
        if self.batch_size == 1:
            return "--ctx_len, --num_latents or --expansion_factor"
        halved, doubled = self.batch_size // 2, 2 * self.grad_acc_steps
        return f"--batch_size from {self.batch_size} to {halved} and raise --grad_acc_steps to {doubled}"

    @property
    def end_to_end(self) -> bool:
        """Whether the loss is computed on the model's outputs with the SAE spliced in."""
        return self.loss_fn in END_TO_END_LOSSES


class SaeState:
    """One SAE in training: coder, normalization of its inputs, training step, firing counters and spike detector.

    ``normalize_inputs`` maps raw activations (N, D) to coder inputs, and ``data_variance`` is E‖x‖² of these.
    ``mse_per_fvu`` is the factor from FVU to the mean squared error per element in raw units. Each step adds
    ``dead_bias_lr_multiplier`` times the learning rate to the encoder bias of dead latents. ``stop_on_spike``: a loss
    spike ends the run.
    """

    def __init__(
        self,
        hookpoint: str,
        coder: SparseCoder,
        normalize_inputs: Callable[[Tensor], Tensor],
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
        self.hookpoint, self.coder, self.normalize_inputs, self.seed = hookpoint, coder, normalize_inputs, seed
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

    def forward_backward(self, batch: Tensor | SplicedBatch, ctx: StepContext) -> None:
        """Accumulate gradients and counts of one micro-batch of raw activations."""
        if isinstance(batch, SplicedBatch):
            x_ND, ctx = self.normalize_inputs(batch.raw_ND), replace(ctx, n_tokens=batch.step_tokens)
            stats = self.train_step.forward_backward(x_ND, ctx, objective=batch.objective)
        else:
            stats = self.train_step.forward_backward(self.normalize_inputs(batch), ctx)
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
        # The lower bound keeps the AuxK loss finite if the reconstruction is perfect.
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
        fvu = float(mean_fvu if loss_fn in END_TO_END_LOSSES else self.stats.losses["recon"])
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


class Trainer:
    """Trains several SAEs together: every SAE sees the same tokens in every step.

    ``is_data_parallel``: every rank trains these SAEs on its part of the tokens, and gradients and counts are summed
    over the ranks.
    """

    def __init__(
        self,
        saes: Mapping[str, SaeState],
        settings: TrainSettings,
        *,
        tokens_per_step: int,
        warmup_steps: int,
        is_data_parallel: bool = False,
    ) -> None:
        self.saes = saes
        self.is_data_parallel = is_data_parallel
        self.settings = settings
        self.tokens_per_step = tokens_per_step
        self.total_steps = settings.max_tokens // tokens_per_step
        self.step = 0
        self._warmup_steps = warmup_steps

    @property
    def tokens_seen(self) -> int:
        """Number of activations trained on so far, over all ranks."""
        return self.step * self.tokens_per_step

    def train_step(
        self,
        get_micro_batch: Callable[[int], MicroBatch],
        before_reduce: Callable[[], object] = lambda: None,
        during_reduce: Callable[[], object] = lambda: None,
    ) -> list[LossSpike]:
        """Run one optimizer step of every SAE; ``get_micro_batch(i)`` returns micro-batch i of the run.

        ``before_reduce`` is called before the all-reduce and may raise to abort the step; ``during_reduce`` is called
        while it runs. Returns the known spikes: those of this step or, if the host runs ahead of the device, those of
        the step DEVICE_LAG_STEPS before.
        """
        contexts = {
            name: sae.build_context(self.step, self.tokens_per_step, self.total_steps)
            for name, sae in self.saes.items()
        }
        factor = lr_factor(self.step, self.total_steps, self._warmup_steps)
        for sae in self.saes.values():
            sae.stats = None
        buckets, first_sae = GradientBuckets(), next(iter(self.saes.values()), None)
        for micro in range(self.settings.grad_acc_steps):
            batch = get_micro_batch(self.step * self.settings.grad_acc_steps + micro)
            for name, sae in self.saes.items():
                record_progress()
                self._forward_backward(name, batch[sae.hookpoint], contexts[name])
                if micro < self.settings.grad_acc_steps - 1:
                    continue
                # Each SAE finishes its step before the next one starts, so that they can share the workspace.
                if not self.is_data_parallel:
                    sae.step_unless_spike(name, sae.peak_lr * factor, contexts[name])
                    continue
                if sae is first_sae:
                    before_reduce()
                sae.add_to_buckets(buckets)
        if self.is_data_parallel:
            buckets.flush()
            during_reduce()
            buckets.wait()
            for name, sae in self.saes.items():
                sae.unpack_reduced(self.tokens_per_step)
                sae.step_unless_spike(name, sae.peak_lr * factor, contexts[name])
        self.step += 1
        return self._pop_spikes(wait=False)

    def drain_spikes(self) -> list[LossSpike]:
        """Wait for the device, and return the spikes that have not been returned yet."""
        return self._pop_spikes(wait=True)

    def _pop_spikes(self, *, wait: bool) -> list[LossSpike]:
        found = [spike for name, sae in self.saes.items() for spike in sae.pop_spikes(name, wait=wait)]
        return sorted(found, key=lambda spike: spike.step)

    def _forward_backward(self, name: str, batch: Tensor | SplicedBatch, ctx: StepContext) -> None:
        try:
            self.saes[name].forward_backward(batch, ctx)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            tokens = len(batch.raw_ND if isinstance(batch, SplicedBatch) else batch)
            raise SaetrainError(
                f"{name}: out of memory in a step over {tokens} tokens x "
                f"{self.saes[name].coder.num_latents} latents: lower {self.settings.suggest_smaller_batch()}"
            ) from error

    def zero_grad(self) -> None:
        """Discard the gradients of the current step."""
        for sae in self.saes.values():
            sae.zero_grad()

    def compute_metrics(self) -> dict[str, dict[str, float]]:
        """Return {SAE: metrics} of the last step."""
        factor = lr_factor(self.step - 1, self.total_steps, self._warmup_steps)
        return {
            name: {**sae.compute_metrics(self.settings.loss_fn), "lr": sae.peak_lr * factor}
            for name, sae in self.saes.items()
        }


class Throughput:
    """Tokens per second between two readings."""

    def __init__(self, tokens: int) -> None:
        self._time_s, self._tokens = time.perf_counter(), tokens

    def read(self, tokens: int) -> float:
        """Tokens per second since the last reading."""
        time_s = time.perf_counter()
        rate = (tokens - self._tokens) / max(time_s - self._time_s, 1e-9)
        self._time_s, self._tokens = time_s, tokens
        return rate

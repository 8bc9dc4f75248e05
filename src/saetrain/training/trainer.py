"""The training step of several SAEs over shared activations, and the loop around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from saetrain.coders.base import SparseCoder
from saetrain.distributed import GradientBuckets
from saetrain.errors import SaetrainError, is_out_of_memory
from saetrain.optim import lr_factor
from saetrain.training.dead_latents import DeadCountBound, FiringTracker
from saetrain.training.loss_spikes import DeviceSpikeDetector, LossSpike, SpikeDetector
from saetrain.training.steps.base import DeviceStep, SplicedBatch, StepStats, TrainStep
from saetrain.types import StepContext

MicroBatch = Mapping[str, Tensor] | Mapping[str, SplicedBatch]
"""{hookpoint: raw activations (n, D)}, or with the loss that they are trained towards."""

END_TO_END_LOSSES = ("ce", "kl")
"""Losses of the model's own outputs, with the SAE spliced in."""
DEVICE_LAG_STEPS = 2
"""Steps behind which the host hears of what the device has found, where it does not wait for it."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Training: how much, in which pieces, towards what."""

    max_tokens: int = 1_000_000
    """Activations to train on, over all ranks."""
    batch_size: int = 4
    """Sequences' worth of activations per rank and micro-step: batch_size x ctx_len of them."""
    grad_acc_steps: int = 1
    """Micro-steps per optimizer step."""
    loss_fn: Literal["mse", "fvu", "ce", "kl"] = "mse"
    """`mse` and `fvu` train alike and are logged in raw units and as a fraction; `ce` and `kl` splice the SAE into the
    model: cross-entropy of its predictions, or their KL divergence from the clean model's (docs/end_to_end.md)."""
    e2e_recon_weight: float = 0.0
    """With `ce` and `kl`: weight of the FVU beside them, in nats."""
    on_spike: Literal["stop", "skip"] = "stop"
    """What to do when a loss is not finite or 100 times its running median: stop the run, or leave the step out."""
    init_seeds: tuple[int, ...] = (42,)
    """Seeds of the initial weights; several train one SAE each in the same pass."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size", "grad_acc_steps"):
            if getattr(self, name) < 1:
                raise SaetrainError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not self.init_seeds or min(self.init_seeds) < 0 or len(set(self.init_seeds)) != len(self.init_seeds):
            raise SaetrainError(f"--init_seeds {list(self.init_seeds)}: give one or more different numbers from 0")
        if not 0 <= self.e2e_recon_weight < float("inf"):
            raise SaetrainError(f"--e2e_recon_weight {self.e2e_recon_weight}: must not be negative")
        if self.e2e_recon_weight and not self.end_to_end:
            raise SaetrainError(
                f"--e2e_recon_weight {self.e2e_recon_weight}: goes with --loss_fn ce or kl; {self.loss_fn} is nothing "
                "but reconstruction"
            )
        if self.end_to_end and len(self.init_seeds) > 1:
            raise SaetrainError(
                f"--loss_fn {self.loss_fn} with {len(self.init_seeds)} --init_seeds: each SAE needs a forward and "
                "backward pass of the model for itself, so nothing would be shared; start one run for each seed"
            )

    def suggest_smaller_batch(self) -> str:
        """What to lower where memory does not suffice."""
        if self.batch_size == 1:
            return "--ctx_len, --num_latents or --expansion_factor"
        halved, doubled = self.batch_size // 2, 2 * self.grad_acc_steps
        return f"--batch_size from {self.batch_size} to {halved} and raise --grad_acc_steps to {doubled}"

    @property
    def end_to_end(self) -> bool:
        """Whether the loss is the model's own, with the SAE spliced in."""
        return self.loss_fn in END_TO_END_LOSSES


class SaeState:
    """One SAE with its inputs' constants, the engine that steps it, and firing counters.

    ``normalize_inputs`` maps raw activations (N, D) to what the coder sees; ``data_variance`` is E‖x‖² of that, and
    ``mse_per_fvu`` the factor from FVU to mean squared error per element in raw units; ``dead_bias_lr_multiplier`` times the learning rate
    is added to the encoder bias of dead latents at every step; ``stop_on_spike``: a spike ends the run.
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
        # Where no step waits for the device, it judges by itself, and the host hears of it later.
        runs_ahead = isinstance(train_step, DeviceStep)
        self._spike_detector = (
            DeviceSpikeDetector(device, DEVICE_LAG_STEPS, stop_on_spike=stop_on_spike)
            if runs_ahead
            else SpikeDetector()
        )
        self._dead_count_bound = DeadCountBound(firing, DEVICE_LAG_STEPS) if runs_ahead and coder.auxk_alpha else None
        self._min_residual_variance = 1e-6 * data_variance
        self.grad_norm = torch.zeros((), device=device)

    def forward_backward(self, batch: Tensor | SplicedBatch, progress: StepContext) -> None:
        """Forward, backward and counting of one micro-batch of raw activations; gradients add up."""
        if isinstance(batch, SplicedBatch):
            progress = replace(progress, n_tokens=batch.step_tokens)
            stats = self.train_step.forward_backward(self.normalize_inputs(batch.raw_ND), progress, batch.objective)
        else:
            stats = self.train_step.forward_backward(self.normalize_inputs(batch), progress)
        self.stats = stats if self.stats is None else self.stats.merge_with(stats)

    def add_to_buckets(self, buckets: GradientBuckets) -> None:
        """Begin to sum the step's gradients and counts over the ranks."""
        assert self.stats is not None
        self._packed_stats = self.stats.pack_row()
        buckets.add([*self.train_step.gradients(), self._packed_stats])

    def unpack_reduced(self, tokens: int) -> None:
        """The sums over all ranks' ``tokens`` are there."""
        assert self.stats is not None
        assert self._packed_stats is not None
        known_tokens = tokens if isinstance(self.train_step, DeviceStep) else None
        self.stats, self._packed_stats = self.stats.unpack_row(self._packed_stats, known_tokens), None

    def build_progress(self, step: int, tokens: int) -> StepContext:
        """What the coder's loss may know of step ``step`` over ``tokens``."""
        bound = self._dead_count_bound
        max_dead = None if bound is None else bound.max_dead_count(tokens)
        dead = None
        if self.coder.auxk_alpha:
            dead = (
                self.firing.dead_mask_or_none() if max_dead is None else self.firing.dead_mask() if max_dead else None
            )
        return StepContext(step, tokens, dead, self.data_variance, self.residual_variance, max_dead)

    def step_unless_spike(self, name: str, step: int, lr: float) -> None:
        """Judge the step and apply it, or leave it out for a spike."""
        assert self.stats is not None
        loss, bound = torch.stack(list(self.stats.losses.values())).sum(), self.train_step.norm_bound()
        if isinstance(self._spike_detector, DeviceSpikeDetector):
            assert isinstance(self.train_step, DeviceStep)
            assert isinstance(bound, Tensor)
            ok = self._spike_detector.check_step(step, loss, bound)
            self._record_step(self.train_step.optimizer_step(lr, ok), lr, ok)
        elif self._spike_detector.check_step(name, step, float(loss), float(bound)):
            self._record_step(self.train_step.optimizer_step(lr), lr)
        else:
            self.train_step.zero_grad()

    def pop_spikes(self, name: str, *, wait: bool) -> list[LossSpike]:
        """What has left out a step, of those judged by now, or with ``settle`` of all, since the last call."""
        return self._spike_detector.pop_spikes(name, wait=wait)

    def recent_losses(self) -> list[float]:
        """The losses that the running median is taken of."""
        return self._spike_detector.recent_losses()

    def zero_grad(self) -> None:
        """Forget the step's gradients."""
        self.train_step.zero_grad()

    def _record_step(self, norm: Tensor, lr: float, ok: Tensor | None = None) -> None:
        """Close the firing counts, and hand the residual's variance to the next step, unless ``ok`` is false."""
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
        # A perfect reconstruction must not make AuxK's loss explode.
        variance = variance.clamp_min(self._min_residual_variance)
        self.residual_variance = variance if ok is None else torch.where(ok, variance, self.residual_variance)

    @torch.no_grad()
    def _raise_dead_biases(self, lr: float, ok: Tensor | None) -> None:
        """Bring latents that have not fired within the window nearer to the top k, until they do."""
        if self._dead_bias_lr_multiplier:
            dead_mask = self.firing.dead_mask() if ok is None else self.firing.dead_mask() & ok
            self.coder.b_enc.add_(dead_mask, alpha=self._dead_bias_lr_multiplier * lr)

    def compute_metrics(self, loss_fn: str) -> dict[str, float]:
        """Figures of the step just done; each is of that step or of the firing windows, never of the log interval."""
        assert self.stats is not None
        unit = self.mse_per_fvu if loss_fn == "mse" else 1.0
        terms = {f"loss_{name}": float(value) * unit for name, value in self.stats.losses.items()}
        tokens = max(self.stats.tokens, 1)
        # End to end, the term may be weighted or left out.
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
        """All that changes while training, as tensors: what a checkpoint holds."""
        return {
            **{f"coder.{name}": value.detach() for name, value in self.coder.named_parameters()},
            **{f"optimizer.{name}": value for name, value in self.train_step.state_dict().items()},
            **{f"firing.{name}": value for name, value in self.firing.state_dict().items()},
            "residual_variance": self.residual_variance,
            **({} if self._dead_count_bound is None else {"dead_ahead": self._dead_count_bound.state_dict()}),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], recent_losses: list[float]) -> None:
        """Take back what :meth:`state_dict` and :meth:`recent_losses` gave."""
        self._spike_detector.load_recent_losses(recent_losses)
        parts: dict[str, dict[str, Tensor]] = {"coder": {}, "optimizer": {}, "firing": {}}
        for name, value in state.items():
            if "." in name:
                head, rest = name.split(".", 1)
                parts[head][rest] = value
        for name, parameter in self.coder.named_parameters():
            parameter.copy_(parts["coder"][name])
        self.train_step.load_state_dict(parts["optimizer"])
        self.firing.load_state_dict(parts["firing"])
        # A run that began with other kernels has none.
        if self._dead_count_bound is not None and "dead_ahead" in state:
            self._dead_count_bound.load_state_dict(state["dead_ahead"])
        self.residual_variance.copy_(state["residual_variance"])


class Trainer:
    """Trains SAEs in step: every SAE sees the same tokens at every step.

    ``is_data_parallel``: every rank trains these SAEs on its part of the tokens, so gradients and counts are summed over ranks.
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
        """Activations trained on so far, over all ranks."""
        return self.step * self.tokens_per_step

    def train_step(
        self,
        get_micro_batch: Callable[[int], MicroBatch],
        before_reduce: Callable[[], object] = lambda: None,
        during_reduce: Callable[[], object] = lambda: None,
    ) -> list[LossSpike]:
        """One optimizer step of every SAE. ``micro_batches(i)`` gives micro-batch i of the run.

        ``before_reduce`` is called before sums over the ranks begin, and may raise to leave the step; ``during_reduce`` while
        they travel. Gives the spikes that left out an SAE's step: this one's, or where the host runs ahead of the
        device that of LAG steps before.
        """
        progress = {name: sae.build_progress(self.step, self.tokens_per_step) for name, sae in self.saes.items()}
        factor = lr_factor(self.step, self.total_steps, self._warmup_steps)
        for sae in self.saes.values():
            sae.stats = None
        buckets, first_sae = GradientBuckets(), next(iter(self.saes.values()), None)
        for micro in range(self.settings.grad_acc_steps):
            batch = get_micro_batch(self.step * self.settings.grad_acc_steps + micro)
            for name, sae in self.saes.items():
                self._forward_backward(name, batch[sae.hookpoint], progress[name])
                if micro < self.settings.grad_acc_steps - 1:
                    continue
                # Each ends its step before the next begins, so that they can use the same memory in turn.
                if not self.is_data_parallel:
                    sae.step_unless_spike(name, self.step + 1, sae.peak_lr * factor)
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
                sae.step_unless_spike(name, self.step + 1, sae.peak_lr * factor)
        self.step += 1
        return self._pop_spikes(wait=False)

    def drain_spikes(self) -> list[LossSpike]:
        """The spikes of steps whose verdict has not been given yet; waits for the device."""
        return self._pop_spikes(wait=True)

    def _pop_spikes(self, *, wait: bool) -> list[LossSpike]:
        found = [spike for name, sae in self.saes.items() for spike in sae.pop_spikes(name, wait=wait)]
        return sorted(found, key=lambda spike: spike.step)

    def _forward_backward(self, name: str, batch: Tensor | SplicedBatch, progress: StepContext) -> None:
        try:
            self.saes[name].forward_backward(batch, progress)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            tokens = len(batch.raw_ND if isinstance(batch, SplicedBatch) else batch)
            raise SaetrainError(
                f"{name}: out of memory in a step over {tokens} tokens x "
                f"{self.saes[name].coder.num_latents} latents: lower {self.settings.suggest_smaller_batch()}"
            ) from error

    def zero_grad(self) -> None:
        """Forget what the step under way has added up."""
        for sae in self.saes.values():
            sae.zero_grad()

    def compute_metrics(self) -> dict[str, dict[str, float]]:
        """{SAE: figures} of the step just done."""
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

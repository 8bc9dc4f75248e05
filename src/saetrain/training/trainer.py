"""The optimizer step of several SAEs on shared activations, with gradient accumulation and data parallelism."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from saetrain.distributed import GradientBuckets, record_progress
from saetrain.errors import SaetrainError, is_out_of_memory
from saetrain.optim import lr_factor
from saetrain.settings import Factor, Seed, Settings, Size, Total
from saetrain.training.loss_spikes import LossSpike
from saetrain.training.sae_state import SaeState
from saetrain.training.steps.base import MicroBatch
from saetrain.types import StepContext
from saetrain.untrusted import show_value

SiteBatches = Mapping[str, MicroBatch]
"""{site: its micro-batch}."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """Training: tokens, batch size and loss."""

    max_tokens: Total = 1_000_000
    """Number of activations to train on, over all processes."""
    batch_size: Size = 4
    """Size of a micro-batch per process, in sequences: it has batch_size x ctx_len activations."""
    grad_acc_steps: Size = 1
    """Micro-batches per optimizer step."""
    loss_fn: Literal["mse", "fvu", "ce", "kl"] = "mse"
    """`mse`, `fvu`: reconstruction error; `ce`, `kl`: the model's loss with the SAE in it (docs/end_to_end.md)."""
    e2e_recon_weight: Factor = 0.0
    """With `ce` and `kl`: weight of the FVU that is added to the loss, in nats."""
    on_spike: Literal["stop", "skip"] = "stop"
    """Reaction to a loss that is not finite or above 100 times its running median: stop the SAE, or skip the step."""
    init_seeds: tuple[Seed, ...] = (42,)
    """Seeds of the initial weights; each seed trains its own SAE in the same run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.init_seeds or len(set(self.init_seeds)) != len(self.init_seeds):
            raise SaetrainError(f"--init_seeds {show_value(self.init_seeds)}: give one or more different numbers")
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
        return self.loss_fn in ("ce", "kl")


@dataclass(frozen=True)
class EndedSae:
    """The end of an SAE at a loss spike: the step of the spike, and the step after which its weights were taken."""

    spike_step: int
    weights_step: int


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
        self.ended: dict[str, EndedSae] = {}
        """{SAE: how a loss spike ended it}, for SAEs that take no more steps; those of all ranks."""
        self.is_data_parallel = is_data_parallel
        self.settings = settings
        self.tokens_per_step = tokens_per_step
        self.total_steps = settings.max_tokens // tokens_per_step
        self.step = 0
        self._warmup_steps = warmup_steps
        self._step_times: dict[str, list[float]] = {name: [] for name in saes}

    @property
    def active_saes(self) -> dict[str, SaeState]:
        """The SAEs of this rank that still take steps."""
        return {name: sae for name, sae in self.saes.items() if name not in self.ended}

    @property
    def tokens_seen(self) -> int:
        """Number of activations trained on so far, over all ranks."""
        return self.step * self.tokens_per_step

    def train_step(
        self,
        batches: Iterator[SiteBatches],
        before_reduce: Callable[[], object] = lambda: None,
        during_reduce: Callable[[], object] = lambda: None,
    ) -> list[LossSpike]:
        """Run one optimizer step of every SAE on the next micro-batches.

        ``before_reduce`` is called before the all-reduce and may raise to abort the step; ``during_reduce`` is called
        while it runs. Returns the known spikes: those of this step or, if the host runs ahead of the device, those of
        the step DEVICE_LAG_STEPS before.
        """
        saes = self.active_saes
        contexts = {
            name: sae.build_context(self.step, self.tokens_per_step, self.total_steps) for name, sae in saes.items()
        }
        factor = lr_factor(self.step, self.total_steps, self._warmup_steps)
        for sae in saes.values():
            sae.stats = None
        buckets, first_sae = GradientBuckets(), next(iter(saes.values()), None)
        for micro in range(self.settings.grad_acc_steps):
            batch = next(batches)
            is_last = micro == self.settings.grad_acc_steps - 1
            for name, sae in saes.items():
                record_progress()
                start_s = time.perf_counter()
                self._forward_backward(name, batch[sae.site.name], contexts[name])
                # Each SAE finishes its step before the next one starts, so that they can share the workspace.
                if is_last and not self.is_data_parallel:
                    sae.step_unless_spike(name, sae.peak_lr * factor, contexts[name])
                self._step_times[name].append(time.perf_counter() - start_s)
                if is_last and self.is_data_parallel:
                    if sae is first_sae:
                        before_reduce()
                    sae.add_to_buckets(buckets)
        if self.is_data_parallel:
            buckets.flush()
            during_reduce()
            buckets.wait()
            for name, sae in saes.items():
                sae.unpack_reduced(self.tokens_per_step)
                sae.step_unless_spike(name, sae.peak_lr * factor, contexts[name])
        self.step += 1
        return self._pop_spikes(wait=False)

    def drain_spikes(self) -> list[LossSpike]:
        """Wait for the device, and return the spikes that have not been returned yet."""
        return self._pop_spikes(wait=True)

    def _pop_spikes(self, *, wait: bool) -> list[LossSpike]:
        found = [spike for name, sae in self.active_saes.items() for spike in sae.pop_spikes(name, wait=wait)]
        return sorted(found, key=lambda spike: spike.step)

    def _forward_backward(self, name: str, batch: MicroBatch, ctx: StepContext) -> None:
        try:
            self.saes[name].forward_backward(batch, ctx)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise SaetrainError(
                f"{name}: out of memory in a step over {len(batch.x_ND)} tokens x "
                f"{self.saes[name].coder.num_latents} latents: lower {self.settings.suggest_smaller_batch()}"
            ) from error

    def zero_grad(self) -> None:
        """Discard the gradients of the current step."""
        for sae in self.saes.values():
            sae.zero_grad()

    def compute_metrics(self) -> dict[str, dict[str, float]]:
        """Return {SAE: metrics} of the last step, of the SAEs that took it.

        ``step_ms``: mean time of a micro-batch of the SAE since the last call. The host does not wait for a GPU, so
        there the SAE has no such metric.
        """
        factor = lr_factor(self.step - 1, self.total_steps, self._warmup_steps)
        metrics = {}
        for name, sae in self.active_saes.items():
            metrics[name] = {**sae.compute_metrics(self.settings.loss_fn), "lr": sae.peak_lr * factor}
            if sae.coder.W_dec.device.type == "cpu":
                metrics[name]["step_ms"] = 1e3 * statistics.mean(self._step_times[name])
            self._step_times[name].clear()
        return metrics


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

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
from saetrain.training.engine import DeviceEngine, Engine, MicroStep, SplicedBatch
from saetrain.training.firing import DeadAhead, FiringTracker
from saetrain.training.spikes import DeviceJudge, HostJudge, Spike
from saetrain.types import StepContext

Batch = Mapping[str, Tensor] | Mapping[str, SplicedBatch]
"""{hookpoint: raw activations (n, D)}, or with the loss that they are trained towards."""

END_TO_END = ("ce", "kl")
"""Losses of the model's own outputs, with the SAE spliced in."""
LAG = 2
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

    def smaller_batch(self) -> str:
        """What to lower where memory does not suffice."""
        if self.batch_size == 1:
            return "--ctx_len, --num_latents or --expansion_factor"
        half, twice = self.batch_size // 2, 2 * self.grad_acc_steps
        return f"--batch_size from {self.batch_size} to {half} and raise --grad_acc_steps to {twice}"

    @property
    def end_to_end(self) -> bool:
        """Whether the loss is the model's own, with the SAE spliced in."""
        return self.loss_fn in END_TO_END


class SaeTrainer:
    """One SAE with its inputs' constants, the engine that steps it, and firing counters.

    ``inputs`` maps raw activations (N, D) to what the coder sees; ``data_variance`` is E‖x‖² of that, and
    ``raw_mse`` the factor from FVU to mean squared error per element in raw units; ``lift`` times the learning rate
    is added to the encoder bias of dead latents at every step; ``halts``: a spike ends the run.
    """

    def __init__(
        self,
        hookpoint: str,
        coder: SparseCoder,
        inputs: Callable[[Tensor], Tensor],
        engine: Engine,
        firing: FiringTracker,
        *,
        data_variance: float,
        raw_mse: float,
        lr: float,
        seed: int,
        lift: float = 0.0,
        halts: bool = True,
    ) -> None:
        device = coder.W_dec.device
        self.hookpoint, self.coder, self.inputs, self.seed = hookpoint, coder, inputs, seed
        self.engine, self.firing, self.peak_lr, self.raw_mse = engine, firing, lr, raw_mse
        self._lift = lift
        self.data_variance = torch.tensor(data_variance, device=device)
        self.residual_variance = self.data_variance.clone()
        self.sums: MicroStep | None = None
        self._row: Tensor | None = None
        # Where no step waits for the device, it judges by itself, and the host hears of it later.
        runs_ahead = isinstance(engine, DeviceEngine)
        self._judge = DeviceJudge(device, LAG, halts=halts) if runs_ahead else HostJudge()
        self._dead_ahead = DeadAhead(firing, LAG) if runs_ahead and coder.auxk_alpha else None
        self._floor = 1e-6 * data_variance
        self.grad_norm = torch.zeros((), device=device)

    def micro_step(self, batch: Tensor | SplicedBatch, progress: StepContext) -> None:
        """Forward, backward and counting of one micro-batch of raw activations; gradients add up."""
        if isinstance(batch, SplicedBatch):
            progress = replace(progress, n_tokens=batch.step_tokens)
            done = self.engine.micro_step(self.inputs(batch.raw_ND), progress, batch.objective)
        else:
            done = self.engine.micro_step(self.inputs(batch), progress)
        self.sums = done if self.sums is None else self.sums.plus(done)

    def add_up(self, reduction: GradientBuckets) -> None:
        """Begin to sum the step's gradients and counts over the ranks."""
        assert self.sums is not None
        self._row = self.sums.packed()
        reduction.add([*self.engine.gradients(), self._row])

    def added_up(self, tokens: int) -> None:
        """The sums over all ranks' ``tokens`` are there."""
        assert self.sums is not None
        assert self._row is not None
        known = tokens if isinstance(self.engine, DeviceEngine) else None
        self.sums, self._row = self.sums.unpacked(self._row, known), None

    def progress(self, step: int, tokens: int) -> StepContext:
        """What the coder's loss may know of step ``step`` over ``tokens``."""
        ahead = self._dead_ahead
        most = None if ahead is None else ahead.most(tokens)
        dead = None
        if self.coder.auxk_alpha:
            dead = self.firing.dead() if most is None else self.firing.silent() if most else None
        return StepContext(step, tokens, dead, self.data_variance, self.residual_variance, most)

    def finish(self, name: str, step: int, lr: float) -> None:
        """Judge the step and apply it, or leave it out for a spike."""
        assert self.sums is not None
        loss, bound = torch.stack(list(self.sums.losses.values())).sum(), self.engine.norm_bound()
        if isinstance(self._judge, DeviceJudge):
            assert isinstance(self.engine, DeviceEngine)
            assert isinstance(bound, Tensor)
            gate = self._judge.gate(step, loss, bound)
            self._finish_step(self.engine.apply(lr, gate), lr, gate)
        elif self._judge.fine(name, step, float(loss), float(bound)):
            self._finish_step(self.engine.apply(lr), lr)
        else:
            self.engine.drop()

    def spikes(self, name: str, *, settle: bool) -> list[Spike]:
        """What has left out a step, of those judged by now, or with ``settle`` of all, since the last call."""
        return self._judge.spikes(name, settle=settle)

    def recent_losses(self) -> list[float]:
        """The losses that the running median is taken of."""
        return self._judge.recent()

    def drop_step(self) -> None:
        """Forget the step's gradients."""
        self.engine.drop()

    def _finish_step(self, norm: Tensor, lr: float, gate: Tensor | None = None) -> None:
        """Close the firing counts, and hand the residual's variance to the next step, unless ``gate`` is false."""
        assert self.sums is not None
        self.grad_norm = norm
        self.firing.observe(self.sums.fired, self.sums.tokens)
        self.firing.finish_step(gate)
        if self._dead_ahead is not None:
            self._dead_ahead.after_step(self.sums.tokens)
        self._lift_dead(lr, gate)
        tokens = max(self.sums.tokens, 1)
        mean = self.sums.residual_sum / tokens
        variance = self.sums.residual_square / tokens - mean.pow(2).sum()
        # A perfect reconstruction must not make AuxK's loss explode.
        variance = variance.clamp_min(self._floor)
        self.residual_variance = variance if gate is None else torch.where(gate, variance, self.residual_variance)

    @torch.no_grad()
    def _lift_dead(self, lr: float, gate: Tensor | None) -> None:
        """Bring latents that have not fired within the window nearer to the top k, until they do."""
        if self._lift:
            silent = self.firing.silent() if gate is None else self.firing.silent() & gate
            self.coder.b_enc.add_(silent, alpha=self._lift * lr)

    def metrics(self, loss_fn: str) -> dict[str, float]:
        """Figures of the step just done; each is of that step or of the firing windows, never of the log interval."""
        assert self.sums is not None
        unit = self.raw_mse if loss_fn == "mse" else 1.0
        terms = {f"loss_{name}": float(value) * unit for name, value in self.sums.losses.items()}
        tokens = max(self.sums.tokens, 1)
        # End to end, the term may be weighted or left out.
        whole = self.sums.residual_square / (tokens * self.data_variance)
        fvu = float(whole if loss_fn in END_TO_END else self.sums.losses["recon"])
        return {
            "loss": sum(terms.values()),
            **terms,
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "l0": float(self.sums.fired.sum()) / tokens,
            **self.firing.metrics(),
            "grad_norm": float(self.grad_norm),
        }

    def state(self) -> dict[str, Tensor]:
        """All that changes while training, as tensors: what a checkpoint holds."""
        return {
            **{f"coder.{name}": value.detach() for name, value in self.coder.named_parameters()},
            **{f"optimizer.{name}": value for name, value in self.engine.state().items()},
            **{f"firing.{name}": value for name, value in self.firing.state().items()},
            "residual_variance": self.residual_variance,
            **({} if self._dead_ahead is None else {"dead_ahead": self._dead_ahead.state()}),
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], recent_losses: list[float]) -> None:
        """Take back what :meth:`state` and :meth:`recent_losses` gave."""
        self._judge.restore(recent_losses)
        parts: dict[str, dict[str, Tensor]] = {"coder": {}, "optimizer": {}, "firing": {}}
        for name, value in state.items():
            if "." in name:
                head, rest = name.split(".", 1)
                parts[head][rest] = value
        for name, parameter in self.coder.named_parameters():
            parameter.copy_(parts["coder"][name])
        self.engine.restore(parts["optimizer"])
        self.firing.restore(parts["firing"])
        # A run that began with other kernels has none.
        if self._dead_ahead is not None and "dead_ahead" in state:
            self._dead_ahead.restore(state["dead_ahead"])
        self.residual_variance.copy_(state["residual_variance"])


class Trainer:
    """Trains SAEs in step: every SAE sees the same tokens at every step.

    ``shared``: every rank trains these SAEs on its part of the tokens, so gradients and counts are summed over ranks.
    """

    def __init__(
        self,
        saes: Mapping[str, SaeTrainer],
        settings: TrainSettings,
        *,
        tokens: int,
        warmup: int,
        shared: bool = False,
    ) -> None:
        self.saes = saes
        self.shared = shared
        self.settings = settings
        self.tokens_per_step = tokens
        self.steps = settings.max_tokens // tokens
        self.step = 0
        self._warmup = warmup

    @property
    def tokens(self) -> int:
        """Activations trained on so far, over all ranks."""
        return self.step * self.tokens_per_step

    def train_step(
        self,
        micro_batches: Callable[[int], Batch],
        before_sums: Callable[[], object] = lambda: None,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> list[Spike]:
        """One optimizer step of every SAE. ``micro_batches(i)`` gives micro-batch i of the run.

        ``before_sums`` is called before sums over the ranks begin, and may raise to leave the step; ``meanwhile`` while
        they travel. Gives the spikes that left out an SAE's step: this one's, or where the host runs ahead of the
        device that of LAG steps before.
        """
        progress = {name: sae.progress(self.step, self.tokens_per_step) for name, sae in self.saes.items()}
        factor = lr_factor(self.step, self.steps, self._warmup)
        for sae in self.saes.values():
            sae.sums = None
        reduction, first = GradientBuckets(), next(iter(self.saes.values()), None)
        for micro in range(self.settings.grad_acc_steps):
            batch = micro_batches(self.step * self.settings.grad_acc_steps + micro)
            for name, sae in self.saes.items():
                self._micro_step(name, batch[sae.hookpoint], progress[name])
                if micro < self.settings.grad_acc_steps - 1:
                    continue
                # Each ends its step before the next begins, so that they can use the same memory in turn.
                if not self.shared:
                    sae.finish(name, self.step + 1, sae.peak_lr * factor)
                    continue
                if sae is first:
                    before_sums()
                sae.add_up(reduction)
        if self.shared:
            reduction.flush()
            meanwhile()
            reduction.wait()
            for name, sae in self.saes.items():
                sae.added_up(self.tokens_per_step)
                sae.finish(name, self.step + 1, sae.peak_lr * factor)
        self.step += 1
        return self._spikes(settle=False)

    def settle(self) -> list[Spike]:
        """The spikes of steps whose verdict has not been given yet; waits for the device."""
        return self._spikes(settle=True)

    def _spikes(self, *, settle: bool) -> list[Spike]:
        found = [spike for name, sae in self.saes.items() for spike in sae.spikes(name, settle=settle)]
        return sorted(found, key=lambda spike: spike.step)

    def _micro_step(self, name: str, batch: Tensor | SplicedBatch, progress: StepContext) -> None:
        try:
            self.saes[name].micro_step(batch, progress)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            tokens = len(batch.raw_ND if isinstance(batch, SplicedBatch) else batch)
            raise SaetrainError(
                f"{name}: out of memory in a step over {tokens} tokens x "
                f"{self.saes[name].coder.num_latents} latents: lower {self.settings.smaller_batch()}"
            ) from error

    def drop_step(self) -> None:
        """Forget what the step under way has added up."""
        for sae in self.saes.values():
            sae.drop_step()

    def metrics(self) -> dict[str, dict[str, float]]:
        """{SAE: figures} of the step just done."""
        factor = lr_factor(self.step - 1, self.steps, self._warmup)
        return {
            name: {**sae.metrics(self.settings.loss_fn), "lr": sae.peak_lr * factor} for name, sae in self.saes.items()
        }


class Throughput:
    """Tokens per second between two readings."""

    def __init__(self, tokens: int) -> None:
        self._time, self._tokens = time.perf_counter(), tokens

    def read(self, tokens: int) -> float:
        """Tokens per second since the last reading."""
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._time, self._tokens = now, tokens
        return rate

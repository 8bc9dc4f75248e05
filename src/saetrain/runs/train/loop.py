"""The training loop: steps, logs, evaluations and checkpoints, from the first step or a checkpoint to the end."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saetrain import distributed
from saetrain.activations.normalize import Normalizer
from saetrain.atomic_io import write_json
from saetrain.coders import SparseCoder
from saetrain.config import EvaluateConfig, to_flat
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.evaluation.evaluator import evaluate_coders
from saetrain.logs import MetricsLogger
from saetrain.logs.base import MetricsRecord, RunInfo
from saetrain.logs.console import ProgressLine, log_rank0
from saetrain.runs.evaluate.run import evaluate_saes as evaluate_saved
from saetrain.runs.run_dir import CHECKPOINTS_DIR, SPIKE_FILE, report_write_errors
from saetrain.runs.train.batches import BatchSourceState, build_batch_source
from saetrain.runs.train.gather import RankGather
from saetrain.runs.train.metadata import log_run_start, log_run_summary
from saetrain.runs.train.rank_metrics import RankMetrics
from saetrain.runs.train.resume import content_hashes
from saetrain.runs.train.saving import fold_coders, save_saes
from saetrain.runs.train.setup import RunContext, held_out_batches, read_first_sequences, resolve_config
from saetrain.training.checkpoint import MAX_INTERVAL_MINUTES, Checkpoint, rename_suspect, save_checkpoint
from saetrain.training.loss_spikes import LossSpike
from saetrain.training.preemption import Preempted, PreemptionHandler
from saetrain.training.trainer import DEVICE_LAG_STEPS, MicroBatch, Throughput, Trainer

MAX_SKIPPED_STEPS = 10
"""Number of consecutive steps that --on_spike skip skips before the run fails."""


@dataclass(frozen=True)
class SyncedFlags:
    """Flags that the ranks exchange in a step; each is the maximum over the ranks."""

    dropped: int = 0
    signal: int = 0
    wants_metrics: int = 0
    """Whether the step's metrics are logged."""
    checkpoint_due: int = 0
    """Whether a checkpoint is overdue."""


class TrainLoop:
    """Runs the steps, logs, evaluations and checkpoints of a run in order."""

    def __init__(
        self,
        context: RunContext,
        trainer: Trainer,
        normalizers: dict[str, Normalizer],
        directory: Path,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.context, self.directory = context, directory
        self.has_ended = False
        self.rank_gather = RankGather(context)
        self.is_rank0 = env.rank() == 0
        self.flags = SyncedFlags()
        self._pending_flags: distributed.AsyncAllReduce | None = None
        batch = context.config.train
        self.requested_batch = (
            checkpoint.values["asked_batch"] if checkpoint else [batch.batch_size, batch.grad_acc_steps]
        )
        self.requested_lr = checkpoint.values["asked_lr"] if checkpoint else context.config.optim.lr
        self.trainer, self.normalizers, self.config = trainer, normalizers, context.config
        self.batch_source = build_batch_source(context, normalizers)
        if checkpoint is not None:
            self.batch_source.load_state_dict(checkpoint.values["buffer"])
            log_rank0(f"resumed from {checkpoint.path} at step {self.trainer.step} of {self.trainer.total_steps}")
        self.source_state = self.batch_source.state_dict()
        self._recent_states: deque[tuple[int, BatchSourceState]] = deque(maxlen=DEVICE_LAG_STEPS + 1)
        self.settings = to_flat(resolve_config(context))
        info = RunInfo(
            run_dir=directory,
            name=directory.name,
            settings=self.settings,
            total_steps=self.trainer.total_steps,
            resumed_step=checkpoint.values["step"] if checkpoint else None,
            sink_state=checkpoint.values["logs"] if checkpoint else {},
        )
        self.saved_at_s, self.saved_step = time.monotonic(), checkpoint.values["step"] if checkpoint else None
        with self.report_write_errors():
            self.log = MetricsLogger(self.config.logs, info, disabled=not self.is_rank0)
        distributed.on_peer_failure(lambda: self.log.close(failed=True))
        self.rank_metrics = RankMetrics()
        self._n_skipped, self._last_skipped_step = 0, -1
        self.preemption = PreemptionHandler()
        context.train_source.set_interrupt_check(self._raise_if_stopping)
        self.progress_line = ProgressLine(self.trainer.total_steps, self.trainer.step)

    def run(self) -> None:
        """Run the remaining steps, then evaluate and save the SAEs; raises CoordinatedExit if a signal stopped it."""
        log_run_start(self.context, self.trainer)
        failed = True
        try:
            with self.preemption:
                distributed.set_phase("training")
                finished = self._run_steps()
                distributed.set_phase("scoring and saving the SAEs")
                if finished:
                    self._calibrate_coders()
                    final = self.evaluate_held_out("final")
                    guard = self.report_write_errors
                    save_saes(self.directory, self.context, self.trainer, self.normalizers, final, guard)
                    if self.is_rank0:
                        log_run_summary(self.directory, final)
            if finished:
                # Only rank 0 has work left.
                distributed.destroy_process_group()
            if finished and self.config.assess and self.is_rank0:
                self.assess_saved_saes()
            failed = False
        finally:
            # A thread that prefetches would keep the process of a failed run alive.
            self.has_ended = True
            self.batch_source.close()
            with self.report_write_errors():
                self.log.close(failed)
        if not finished:
            raise distributed.CoordinatedExit(self.preemption.exit_code)

    def _raise_if_stopping(self) -> None:
        """Raise :class:`Preempted` after a signal or at the end of the run, so that reading stops."""
        self.preemption.raise_if_preempted()
        if self.has_ended:
            raise Preempted

    def report_write_errors(self) -> AbstractContextManager[None]:
        """Convert errors of writing to a SaetrainError that names the step."""
        return report_write_errors(self.directory, f"at step {self.trainer.step}", self.saved_step is not None)

    def _run_steps(self) -> bool:
        """Run all steps; return False if a signal stopped the run, after a checkpoint."""
        trainer, progress_line = self.trainer, self.progress_line
        startup_message = self.batch_source.startup_message()
        if startup_message is not None and trainer.step < trainer.total_steps:
            log_rank0(startup_message)
        speed = Throughput(trainer.tokens_seen)
        try:
            while trainer.step < trainer.total_steps and not self._should_stop():
                distributed.set_progress(f"step {trainer.step + 1}")
                if not self._run_step():
                    break
                progress_line.update(trainer.step, self._log_step(speed))
                if self._is_step_multiple(self.config.evaluation.eval_every) and trainer.step < trainer.total_steps:
                    self._handle_spikes(self.trainer.drain_spikes())
                    self.evaluate_held_out("eval")
                if (
                    self._is_step_multiple(self.config.output.save_every)
                    or trainer.step == trainer.total_steps
                    or self._should_checkpoint()
                ):
                    self._save_if_good()
        finally:
            progress_line.close()
        if trainer.step == trainer.total_steps:
            return True
        if self.saved_step != trainer.step:
            self._save_if_good()
        self.preemption.received_signal = self.preemption.received_signal or signal.Signals(self.flags.signal)
        is_saved = self.saved_step == trainer.step
        saved = "everything is saved" if is_saved else f"the last saved step is {self.saved_step or 0}"
        log_rank0(
            f"stopped by {self.preemption.received_signal.name} after step {trainer.step}; {saved}; continue with "
            "--resume"
        )
        return False

    def _run_step(self) -> bool:
        """Run one optimizer step; return False if it was dropped because of a signal."""
        trainer = self.trainer
        self.context.extractor.before_batch = self.preemption.raise_if_preempted
        step_state = trainer.step + 1, self.source_state
        try:
            spikes = trainer.train_step(self._get_micro_batch, self._sync_flags, self._prefetch)
        except Preempted:
            assert self._pending_flags is None, "the ranks wait for an answer"
            trainer.zero_grad()
            return False
        finally:
            self.context.extractor.before_batch = None
        self._recent_states.append(step_state)
        self.source_state = self.batch_source.state_dict()
        self._handle_spikes(spikes)
        return True

    def _handle_spikes(self, own: list[LossSpike]) -> None:
        """Stop at, or log, the loss spikes of all ranks; ``own``: the spikes of this rank's SAEs."""
        spikes = sorted(self.rank_gather.gather_spikes(own), key=lambda spike: spike.step)
        if spikes and self.config.train.on_spike == "stop":
            raise self._build_spike_error(spikes[0])
        self._log_skipped_steps(spikes)

    def _save_if_good(self) -> None:
        """Write a checkpoint unless the last step was skipped."""
        self._handle_spikes(self.trainer.drain_spikes())
        # After a skipped step the weights may be ruined; only a good step shows that they are not.
        if self._last_skipped_step != self.trainer.step:
            self.write_checkpoint()

    def _get_micro_batch(self, number: int) -> MicroBatch:
        """Return micro-batch ``number``; raises :class:`Preempted` on every rank if one has dropped the step."""
        part, dropped = None, False
        try:
            part = self.batch_source.fetch_local_part(number)
        except Preempted:
            dropped = True
        last = (number + 1) % self.config.train.grad_acc_steps == 0
        # A rank reports a dropped step at the points where the other ranks would wait for it.
        if dropped or last or self.batch_source.needs_exchange(number):
            step = self.trainer.step + 1
            wants_metrics = self.log.should_log(step) or self.progress_line.should_print(step)
            own_flags = [
                int(dropped),
                int(self.preemption.received_signal or 0),
                int(wants_metrics),
                int(self._checkpoint_due()),
            ]
            self._pending_flags = distributed.AsyncAllReduce(own_flags)
            # The flags travel while the ranks compute, unless data must be exchanged right now.
            if dropped or not self.trainer.is_data_parallel or self.batch_source.needs_exchange(number):
                self._sync_flags()
        return self.batch_source.exchange_parts(number, part)

    def _sync_flags(self) -> None:
        """Wait for the flags of all ranks; raises :class:`Preempted` if one of them has dropped the step."""
        if self._pending_flags is None:
            return
        self.flags, self._pending_flags = SyncedFlags(*self._pending_flags.wait()), None
        if self.flags.dropped:
            raise Preempted

    def _prefetch(self) -> None:
        """Run the model for later steps while the SAEs' gradients are exchanged."""
        # The other ranks already have their sums, so the ranks agree on a signal in the next step.
        with contextlib.suppress(Preempted):
            self.batch_source.prefetch_pools()

    def _should_stop(self) -> bool:
        """Return whether the run ends after this step; a single process ends as soon as a signal arrives."""
        stop_signal = self.preemption.received_signal if env.world_size() == 1 else self.flags.signal
        return bool(stop_signal)

    def _log_skipped_steps(self, spikes: list[LossSpike]) -> None:
        """Log the skipped steps; raises SaetrainError after MAX_SKIPPED_STEPS in a row."""
        for spike in spikes:
            log_rank0(f"{spike}; the step is skipped (--on_spike skip)")
            if spike.step != self._last_skipped_step:
                self._n_skipped = self._n_skipped + 1 if spike.step == self._last_skipped_step + 1 else 1
                self._last_skipped_step = spike.step
        if spikes and self._n_skipped >= MAX_SKIPPED_STEPS:
            before = self._last_skipped_step - self._n_skipped
            kept = distributed.run_on_rank0(
                "looking for a good checkpoint", lambda: self._set_aside_last_checkpoint(before)
            )
            raise SaetrainError(
                f"{spikes[0]}; {MAX_SKIPPED_STEPS} steps in a row were skipped, so the weights are ruined. "
                f"{kept}; start another --run_name with a lower --lr"
            )

    def _build_spike_error(self, spike: LossSpike) -> SaetrainError:
        """Write the batch's position to spike.json, and return an error with advice."""
        state = self.rank_gather.gather_states(dict(self._recent_states)[spike.step])
        return SaetrainError(distributed.run_on_rank0("writing spike.json", lambda: self._write_spike(spike, state)))

    def _write_spike(self, spike: LossSpike, state: BatchSourceState) -> str:
        path = self.directory / SPIKE_FILE
        with self.report_write_errors():
            write_json(path, {**spike.facts, "shards": self.batch_source.describe_state(state)})
        return (
            f"{spike}; the batch's position is in {path}. {self._set_aside_last_checkpoint(spike.step - 1)}: restart "
            "with --resume --on_spike skip, or start another --run_name with a lower --lr"
        )

    def _set_aside_last_checkpoint(self, step: int) -> str:
        """Rename the last checkpoint if it was saved at ``step``, right before a spike; return what is kept.

        The update that ruins the weights shows in the loss of the next step.
        """
        if self.saved_step is None:
            return "There is no checkpoint yet"
        with self.report_write_errors():
            before = rename_suspect(self.directory / CHECKPOINTS_DIR, step)
        if before is None:
            return "The last checkpoint is kept"
        return f"The checkpoint of step {step} may be the cause, so it is set aside, and that of step {before} is kept"

    def _is_step_multiple(self, steps: int) -> bool:
        return steps > 0 and self.trainer.step % steps == 0

    def _should_checkpoint(self) -> bool:
        """Return whether a checkpoint was overdue by rank 0's clock when the step began."""
        return bool(self.flags.checkpoint_due) if env.world_size() > 1 else self._checkpoint_due()

    def _checkpoint_due(self) -> bool:
        return self.is_rank0 and time.monotonic() - self.saved_at_s > 60 * MAX_INTERVAL_MINUTES

    def _log_step(self, speed: Throughput) -> dict[str, float] | None:
        """Log the step if a sink wants it, and return the first SAE's metrics for the progress line."""
        trainer = self.trainer
        if not self.flags.wants_metrics:
            return None
        # Reading the metrics waits for the device anyway, so checking for spikes costs nothing more.
        self._handle_spikes(trainer.drain_spikes())
        rate = speed.read(trainer.tokens_seen)
        rank_values = self.rank_metrics.read(trainer.tokens_seen / env.world_size(), self.context.model.device)
        saes = self.rank_gather.gather_entries(trainer.compute_metrics())
        if not self.is_rank0:
            return None
        with self.report_write_errors():
            self.log.write(
                MetricsRecord(
                    "train", trainer.step, trainer.tokens_seen, {"tokens_per_second": rate, **rank_values}, saes
                )
            )
        return {**next(iter(saes.values())), "tokens_per_second": rate}

    def evaluate_held_out(self, kind: Literal["eval", "final"]) -> dict[str, dict[str, float]]:
        """Score all SAEs on held-out text, log their metrics, and return them."""
        if kind == "final":
            log_rank0(f"evaluating on up to {self.config.evaluation.eval_tokens:,} held-out tokens")
        metrics = {}
        # If every rank has the same SAEs, only rank 0 scores them.
        if self.is_rank0 or self.context.placement.owners:
            with distributed.phase("scoring"):
                scores = evaluate_coders(
                    fold_coders(self.trainer, self.normalizers),
                    held_out_batches(self.context),
                    self.config.dead.dead_percentage_threshold,
                    self.config.evaluation.eval_tokens,
                )
            metrics = {name: found.to_log_record() for name, found in scores.items()}
        metrics = self.rank_gather.gather_entries(metrics)
        with self.report_write_errors():
            self.log.write(MetricsRecord(kind, self.trainer.step, self.trainer.tokens_seen, {}, metrics))
        return metrics

    def assess_saved_saes(self) -> None:
        """Evaluate the saved SAEs as `saetrain evaluate` would, and log their verdicts and metrics."""
        config = self.config
        log_rank0(
            "assessing the SAEs on held-out text (--assess false skips this; `saetrain evaluate` can do it later)"
        )
        eval_config = EvaluateConfig(
            path=str(self.directory), scoring=config.scoring, health=config.health, base=config.base, model=config.model
        )
        try:
            assessment = evaluate_saved(eval_config, max_eval_tokens=config.evaluation.eval_tokens)
        except SaetrainError as error:
            # The trained SAEs are already saved and scored.
            log_rank0(f"the assessment failed: {error}")
            return
        with self.report_write_errors():
            self.log.write(
                MetricsRecord("assessment", self.trainer.step, self.trainer.tokens_seen, {}, assessment.to_log_record())
            )

    def _calibrate_coders(self) -> None:
        """Let the coders set their thresholds on training text; every rank uses the same text."""
        saes = self.trainer.saes.values()
        if all(type(sae.coder).calibrate is SparseCoder.calibrate for sae in saes):
            return
        sequences = read_first_sequences(self.context)
        batches = [batch.values for batch in self.context.extractor.iterate_batches(sequences) if len(batch)]
        for sae in saes:
            ctx = sae.build_context(self.trainer.step, self.trainer.tokens_per_step, self.trainer.total_steps)
            sae.coder.calibrate((sae.normalize_inputs(batch[sae.hookpoint]) for batch in batches), ctx)

    def write_checkpoint(self) -> None:
        """Write a checkpoint of everything that the rest of the run depends on; only rank 0 writes files."""
        self.rank_gather.require_equal_weights(self.trainer)
        tensors = self.rank_gather.gather_tensors(
            {name: sae.state_dict() for name, sae in self.trainer.saes.items()}, "sending states"
        )
        tensors.update({f"normalizer:{name}": value.tensor_constants() for name, value in self.normalizers.items()})
        values = {
            "settings": self.settings,
            "identity": content_hashes(self.context),
            "normalizers": {name: value.scalar_constants() for name, value in self.normalizers.items()},
            "rates": self.rank_gather.gather_entries(
                {name: [sae.peak_lr, sae.firing.window_tokens] for name, sae in self.trainer.saes.items()}
            ),
            "losses": self.rank_gather.gather_entries(
                {name: sae.recent_losses() for name, sae in self.trainer.saes.items()}
            ),
            "buffer": self.rank_gather.gather_states(self.source_state),
            "logs": self.log.state_dict(),
            "world_size": env.world_size(),
            "asked_batch": self.requested_batch,
            "asked_lr": self.requested_lr,
        }
        if self.is_rank0:
            with self.report_write_errors(), distributed.phase("writing a checkpoint"):
                self.log.sync_to_disk()
                save_checkpoint(self.directory / CHECKPOINTS_DIR, self.trainer.step, tensors, values)
        # No rank continues or exits before the checkpoint is complete.
        distributed.barrier("waiting for rank 0: writing a checkpoint")
        self.saved_at_s, self.saved_step = time.monotonic(), self.trainer.step

"""The training loop: steps, logs, evaluations and checkpoints, from the first step or a checkpoint to the end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from saetrain import distributed
from saetrain.coders import SparseCoder
from saetrain.distributed import env
from saetrain.logs.console import log_rank0
from saetrain.runs.train.activation_cache import close_activation_cache
from saetrain.runs.train.batches import build_batch_source
from saetrain.runs.train.builders import TrainingRun
from saetrain.runs.train.checkpointing import Checkpointing
from saetrain.runs.train.gather import RankGather
from saetrain.runs.train.metadata import log_next_steps, log_run_start, log_run_summary, raise_if_diverged
from saetrain.runs.train.reporting import Reporting
from saetrain.runs.train.saving import save_saes
from saetrain.runs.train.setup import read_batches_at
from saetrain.training.preemption import Preempted, PreemptionHandler
from saetrain.training.trainer import SiteBatches
from saetrain.types import ModelBatch


@dataclass(frozen=True)
class SyncedFlags:
    """Flags that the ranks exchange in a step; each is the maximum over the ranks."""

    interrupted: int = 0
    """Whether a rank has abandoned the step."""
    signal: int = 0
    wants_metrics: int = 0
    """Whether the step's metrics are logged."""
    checkpoint_due: int = 0
    """Whether a checkpoint is overdue."""


class TrainLoop:
    """Runs the steps of a run in order, with :class:`Checkpointing` and :class:`Reporting`."""

    def __init__(self, run: TrainingRun) -> None:
        self.training_run, self.context, self.trainer = run, run.context, run.trainer
        self.config, self._has_ended = run.context.config, False
        self._flags = SyncedFlags()
        self._pending_flags: distributed.AsyncAllReduce | None = None
        self.batch_source = build_batch_source(run.context, run.normalizers)
        if run.checkpoint is not None:
            self.batch_source.load_state_dict(run.checkpoint.values["buffer"])
            log_rank0(f"resumed from {run.checkpoint.path} at step {run.trainer.step} of {run.trainer.total_steps}")
        self._source_state = self.batch_source.state_dict()
        self.checkpointing = Checkpointing(run, self.batch_source)
        self.reporting = Reporting(run, self.checkpointing.report_write_errors)
        self.preemption = PreemptionHandler()
        run.context.train_source.set_interrupt_check(self._raise_if_stopping)

    def run(self) -> None:
        """Run the remaining steps, then evaluate and save the SAEs; raises CoordinatedExit if a signal stopped it."""
        log_run_start(self.context, self.trainer)
        failed, is_rank0 = True, env.rank() == 0
        try:
            with self.preemption:
                distributed.set_phase("training")
                finished = self._run_steps()
                distributed.set_phase("scoring and saving the SAEs")
                finished = finished and self._calibrate_coders()
                if finished:
                    final = self.reporting.evaluate_held_out("final")
                    guard = self.checkpointing.report_write_errors
                    save_saes(
                        self.training_run.directory,
                        self.context,
                        self.trainer,
                        self.training_run.normalizers,
                        final,
                        guard,
                    )
                    if is_rank0:
                        log_run_summary(final, will_assess=self.config.assess)
            if finished:
                # Only rank 0 has work left.
                distributed.destroy_process_group()
            if finished and self.config.assess and is_rank0:
                self.reporting.assess_saved_saes()
            if finished and self.config.collects_features and is_rank0:
                self.reporting.collect_features()
            if finished and self.config.assess and self.config.report and is_rank0:
                self.reporting.write_page()
            if finished and is_rank0:
                has_model = self.config.activations is None
                directory, sae = self.training_run.directory, next(iter(final))
                log_next_steps(directory, sae, has_model=has_model, is_assessed=self.config.assess)
            failed = False
        finally:
            # A thread that prefetches would keep the process of a failed run alive.
            self._has_ended = True
            self.batch_source.close()
            close_activation_cache(self.context.extractor.cache)
            self.reporting.close(failed=failed)
        if not finished:
            raise distributed.CoordinatedExit(self.preemption.exit_code)
        if is_rank0:
            raise_if_diverged(self.training_run.directory, self.config, final, self.trainer.ended)

    def _raise_if_stopping(self) -> None:
        """Raise :class:`Preempted` after a signal or at the end of the run, so that reading stops."""
        self.preemption.raise_if_preempted()
        if self._has_ended:
            raise Preempted

    def _run_steps(self) -> bool:
        """Run all steps; return False if a signal stopped the run, after a checkpoint."""
        trainer, checkpointing, reporting = self.trainer, self.checkpointing, self.reporting
        batches = self._iterate_batches()
        if trainer.step < trainer.total_steps:
            reporting.start_timing(self.batch_source)
        try:
            while trainer.step < trainer.total_steps and not self._should_stop():
                distributed.set_progress(f"step {trainer.step + 1}")
                if not self._run_step(batches):
                    break
                if self._flags.wants_metrics:
                    # Reading the metrics waits for the device anyway, so checking for spikes costs nothing more.
                    checkpointing.handle_spikes(trainer.drain_spikes())
                reporting.log_step(wants_metrics=bool(self._flags.wants_metrics))
                if self._is_step_multiple(self.config.evaluation.eval_every) and trainer.step < trainer.total_steps:
                    checkpointing.handle_spikes(trainer.drain_spikes())
                    reporting.evaluate_held_out("eval")
                if (
                    self._is_step_multiple(self.config.output.save_every)
                    or trainer.step == trainer.total_steps
                    or self._should_checkpoint()
                ):
                    self._save_if_good()
        finally:
            reporting.progress_line.close()
        if trainer.step == trainer.total_steps:
            return True
        if checkpointing.saved_step != trainer.step:
            self._save_if_good()
        self._log_stop(self._flags.signal)
        return False

    def _log_stop(self, number: int) -> None:
        """Log that a signal stopped the run, and what is saved; ``number``: the signal, if another rank received it."""
        self.preemption.received_signal = self.preemption.received_signal or signal.Signals(number)
        step, saved_step = self.trainer.step, self.checkpointing.saved_step
        saved = "everything is saved" if saved_step == step else f"the last saved step is {saved_step or 0}"
        log_rank0(
            f"stopped by {self.preemption.received_signal.name} after step {step}; {saved}; continue with --resume"
        )

    def _save_if_good(self) -> None:
        self.checkpointing.save_if_good(self._source_state, self.reporting.log)

    def _run_step(self, batches: Iterator[SiteBatches]) -> bool:
        """Run one optimizer step; return False if it was abandoned because of a signal."""
        trainer = self.trainer
        self.context.extractor.set_interrupt_check(self.preemption.raise_if_preempted)
        step_state = trainer.step + 1, self._source_state
        try:
            spikes = trainer.train_step(batches, self._sync_flags, self._prefetch)
        except Preempted:
            assert self._pending_flags is None, "the ranks wait for an answer"
            trainer.zero_grad()
            return False
        finally:
            self.context.extractor.set_interrupt_check(lambda: None)
        self.checkpointing.record_batch(*step_state)
        self._source_state = self.batch_source.state_dict()
        self.checkpointing.handle_spikes(spikes)
        return True

    def _iterate_batches(self) -> Iterator[SiteBatches]:
        """Yield the remaining micro-batches of the run."""
        for number in count(self.trainer.step * self.config.train.grad_acc_steps):
            yield self._get_batches(number)

    def _get_batches(self, number: int) -> SiteBatches:
        """Return micro-batches ``number``; raises :class:`Preempted` on every rank if one has abandoned the step."""
        part, interrupted = None, False
        try:
            part = self.batch_source.fetch_local_part(number)
        except Preempted:
            interrupted = True
        last = (number + 1) % self.config.train.grad_acc_steps == 0
        # A rank reports an abandoned step at the points where the other ranks would wait for it.
        if interrupted or last or self.batch_source.needs_exchange(number):
            step = self.trainer.step + 1
            wants_metrics = self.reporting.wants_metrics(step)
            own_flags = [
                int(interrupted),
                int(self.preemption.received_signal or 0),
                int(wants_metrics),
                int(self.checkpointing.is_overdue()),
            ]
            self._pending_flags = distributed.AsyncAllReduce(own_flags)
            # The flags travel while the ranks compute, unless data must be exchanged right now.
            if interrupted or not self.trainer.is_data_parallel or self.batch_source.needs_exchange(number):
                self._sync_flags()
        return self.batch_source.exchange_parts(number, part)

    def _sync_flags(self) -> None:
        """Wait for the flags of all ranks; raises :class:`Preempted` if one of them has abandoned the step."""
        if self._pending_flags is None:
            return
        self._flags, self._pending_flags = SyncedFlags(*self._pending_flags.wait()), None
        if self._flags.interrupted:
            raise Preempted

    def _prefetch(self) -> None:
        """Run the model for later steps while the SAEs' gradients are exchanged."""
        # The other ranks already have their sums, so the ranks agree on a signal in the next step.
        with contextlib.suppress(Preempted):
            self.batch_source.prefetch_pools()

    def _should_stop(self) -> bool:
        """Return whether the run ends after this step; a single process ends as soon as a signal arrives."""
        stop_signal = self.preemption.received_signal if env.world_size() == 1 else self._flags.signal
        return bool(stop_signal)

    def _is_step_multiple(self, steps: int) -> bool:
        return steps > 0 and self.trainer.step % steps == 0

    def _should_checkpoint(self) -> bool:
        """Return whether a checkpoint was overdue by rank 0's clock when the step began."""
        return bool(self._flags.checkpoint_due) if env.world_size() > 1 else self.checkpointing.is_overdue()

    def _calibrate_coders(self) -> bool:
        """Let the coders set their thresholds on the last training text; every rank uses the same text.

        Return False if a signal stops it.
        """
        if all(plan.config.coder_class.calibrate is SparseCoder.calibrate for plan in self.context.plans.values()):
            return True
        states = RankGather(self.context).gather_states(self.batch_source.state_dict())
        last_batches: list[ModelBatch] = []
        received = 0
        try:
            last_batches = read_batches_at(self.context, self.batch_source.read_cursors(states))
        except Preempted:
            received = int(self.preemption.received_signal or 0)
        # A rank that stopped would leave the others waiting for its scores.
        (received,) = distributed.all_reduce_max([received], "calibrating the SAEs")
        if received:
            self._log_stop(received)
            return False
        batches = [batch.values for batch in self.context.extractor.iterate_batches(last_batches) if len(batch)]
        for sae in self.trainer.saes.values():
            ctx = sae.build_context(self.trainer.step, self.trainer.tokens_per_step, self.trainer.total_steps)
            sae.coder.calibrate((sae.normalize_inputs(sae.site.select_xy(batch)[0]) for batch in batches), ctx)
        return True

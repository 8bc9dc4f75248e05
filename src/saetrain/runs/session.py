"""A run under way: the trainer with its data, logs and folder, from its first step or a checkpoint to the end."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saetrain import distributed, launch
from saetrain.activations.normalize import Normalizer
from saetrain.coders.folding import fold_normalizer
from saetrain.coders.topk import TopK
from saetrain.config import EvaluateConfig, to_flat
from saetrain.errors import SaetrainError
from saetrain.evaluation.heldout import EvalTarget, evaluate_coders
from saetrain.files import write_json
from saetrain.interop.directory import save_sae
from saetrain.logs import MetricsLogger
from saetrain.logs.base import MetricsRecord, RunInfo
from saetrain.logs.console import ProgressLine, log_rank0
from saetrain.logs.jsonl import replace_non_finite
from saetrain.runs.directory import CHECKPOINTS, SAES, SPIKE, writing
from saetrain.runs.evaluate import evaluate as evaluate_saved
from saetrain.runs.feed import State, make_feed
from saetrain.runs.metadata import about_run, announce, hook_name, summary
from saetrain.runs.prepare import Prepared, held_out_batches, resolved
from saetrain.runs.ranks import RankFigures
from saetrain.runs.resume import identity
from saetrain.runs.together import Together
from saetrain.training.checkpoint import MAX_INTERVAL_MINUTES, Checkpoint, rename_suspect, save_checkpoint
from saetrain.training.spikes import LossSpike
from saetrain.training.stop import Preempted, PreemptionHandler
from saetrain.training.trainer import DEVICE_LAG_STEPS, MicroBatch, Throughput, Trainer

MOST_LEFT_OUT = 10
"""Steps in a row that --on_spike skip leaves out before the run is given up."""


@dataclass(frozen=True)
class Agreed:
    """What the ranks know of one another's wishes in a step: each the largest over the ranks."""

    dropped: int = 0
    signal: int = 0
    asked: int = 0
    """Whether the step's figures are wanted."""
    late: int = 0
    """Whether a checkpoint is overdue."""


class Session:
    """Steps, logs, evaluations and checkpoints in their order."""

    def __init__(
        self,
        prepared: Prepared,
        trainer: Trainer,
        normalizers: dict[str, Normalizer],
        directory: Path,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.prepared, self.directory = prepared, directory
        self.ended = False
        self.together = Together(prepared)
        self.first = launch.rank() == 0
        self.agreed = Agreed()
        self._asked: distributed.AsyncAllReduce | None = None
        batch = prepared.config.train
        self.asked_batch = checkpoint.values["asked_batch"] if checkpoint else [batch.batch_size, batch.grad_acc_steps]
        self.asked_lr = checkpoint.values["asked_lr"] if checkpoint else prepared.config.optim.lr
        self.trainer, self.normalizers, self.config = trainer, normalizers, prepared.config
        self.feed = make_feed(prepared, normalizers)
        if checkpoint is not None:
            self.feed.restore(checkpoint.values["buffer"])
            log_rank0(f"resumed from {checkpoint.path} at step {self.trainer.step} of {self.trainer.total_steps}")
        self.place = self.feed.state()
        self._places: deque[tuple[int, State]] = deque(maxlen=DEVICE_LAG_STEPS + 1)
        self.settings = to_flat(resolved(prepared))
        info = RunInfo(
            run_dir=directory,
            name=directory.name,
            settings=self.settings,
            total_steps=self.trainer.total_steps,
            resumed_step=checkpoint.values["step"] if checkpoint else None,
            sink_state=checkpoint.values["logs"] if checkpoint else {},
        )
        self.saved_at, self.saved_step = time.monotonic(), checkpoint.values["step"] if checkpoint else None
        with self.writing():
            self.log = MetricsLogger(self.config.logs, info, disabled=not self.first)
        distributed.on_peer_failure(lambda: self.log.close(failed=True))
        self.ranks = RankFigures()
        self._left_out, self._last_left_out = 0, -1
        self.stop = PreemptionHandler()
        prepared.train.set_interrupt_check(self._check)
        self.line = ProgressLine(self.trainer.total_steps, self.trainer.step)

    def train(self) -> None:
        """Run the remaining steps, then evaluate and save the SAEs; exits where a signal asked for it."""
        announce(self.prepared, self.trainer)
        failed = True
        try:
            with self.stop:
                distributed.set_phase("training")
                finished = self._loop()
                distributed.set_phase("scoring and saving the SAEs")
                if finished:
                    final = self.evaluate("final")
                    self.save_saes(final)
                    if self.first:
                        summary(self.directory, final)
            if finished:
                # What is left to do is rank 0's alone.
                distributed.destroy_process_group()
            if finished and self.config.assess and self.first:
                self.assess()
            failed = False
        finally:
            # What is read ahead for a run that has failed would keep the process alive.
            self.ended = True
            self.feed.close()
            with self.writing():
                self.log.close(failed)
        if not finished:
            raise distributed.CoordinatedExit(self.stop.exit_code)

    def _check(self) -> None:
        """Raise :class:`Stopped` once nothing more is to be read."""
        self.stop.raise_if_preempted()
        if self.ended:
            raise Preempted

    def writing(self) -> AbstractContextManager[None]:
        """Within it, a full or vanished disk ends the run with a message."""
        return writing(self.directory, f"at step {self.trainer.step}", self.saved_step is not None)

    def _loop(self) -> bool:
        """Whether all steps were done; False when a signal stopped it, with everything saved."""
        trainer, line = self.trainer, self.line
        opening = self.feed.opening()
        if opening is not None:
            log_rank0(opening)
        speed = Throughput(trainer.tokens_seen)
        try:
            while trainer.step < trainer.total_steps and not self._stopping():
                distributed.set_progress(f"step {trainer.step + 1}")
                if not self._step():
                    break
                line.update(trainer.step, self._log_step(speed))
                if self._every(self.config.evaluation.eval_every) and trainer.step < trainer.total_steps:
                    self._hear(self.trainer.drain_spikes())
                    self.evaluate("eval")
                if self._every(self.config.output.save_every) or trainer.step == trainer.total_steps or self._overdue():
                    self._save_if_good()
        finally:
            line.close()
        if trainer.step == trainer.total_steps:
            return True
        if self.saved_step != trainer.step:
            self._save_if_good()
        self.stop.received_signal = self.stop.received_signal or signal.Signals(self.agreed.signal)
        good = self.saved_step == trainer.step
        saved = "everything is saved" if good else f"saved is step {self.saved_step or 0}"
        log_rank0(f"stopped by {self.stop.received_signal.name} after step {trainer.step}; {saved}, --resume goes on")
        return False

    def _step(self) -> bool:
        """One optimizer step; False when it was dropped because of a signal."""
        trainer = self.trainer
        self.prepared.reader.before_batch = self.stop.raise_if_preempted
        place = trainer.step + 1, self.place
        try:
            spikes = trainer.train_step(self._micro_batch, self._heed, self._meanwhile)
        except Preempted:
            assert self._asked is None, "the ranks wait for an answer"
            trainer.zero_grad()
            return False
        finally:
            self.prepared.reader.before_batch = None
        self._places.append(place)
        self.place = self.feed.state()
        self._hear(spikes)
        return True

    def _hear(self, own: list[LossSpike]) -> None:
        """Act on the spikes of this rank's SAEs and the others'."""
        spikes = sorted(self.together.spikes(own), key=lambda spike: spike.step)
        if spikes and self.config.train.on_spike == "stop":
            raise self._stopped_by(spikes[0])
        self._leave_out(spikes)

    def _save_if_good(self) -> None:
        """A checkpoint, unless the last step was left out."""
        self._hear(self.trainer.drain_spikes())
        # Behind such a step the weights may be ruined, which only a good step disproves.
        if self._last_left_out != self.trainer.step:
            self.save()

    def _micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch ``number``, or :class:`Stopped` on every rank where one of them has dropped the step."""
        part, dropped = None, False
        try:
            part = self.feed.fetch(number)
        except Preempted:
            dropped = True
        last = (number + 1) % self.config.train.grad_acc_steps == 0
        # A rank that drops a step says so where the others are about to wait for it.
        if dropped or last or self.feed.exchanges(number):
            step = self.trainer.step + 1
            asked = self.log.should_log(step) or self.line.should_print(step)
            mine = [int(dropped), int(self.stop.received_signal or 0), int(asked), int(self._late())]
            self._asked = distributed.AsyncAllReduce(mine)
            # Others hear of it while they compute, unless something is to be exchanged right now.
            if dropped or not self.trainer.is_data_parallel or self.feed.exchanges(number):
                self._heed()
        return self.feed.join(number, part)

    def _heed(self) -> None:
        """What the ranks have asked of one another; :class:`Stopped` where one of them has dropped the step."""
        if self._asked is None:
            return
        self.agreed, self._asked = Agreed(*self._asked.wait()), None
        if self.agreed.dropped:
            raise Preempted

    def _meanwhile(self) -> None:
        """Run the model for later steps while the SAEs' gradients travel."""
        # A signal is agreed on where the next step begins, for the others have their sums by now.
        with contextlib.suppress(Preempted):
            self.feed.work_ahead()

    def _stopping(self) -> bool:
        """Whether the run is to end behind the step that is done; alone, as soon as a signal comes."""
        wish = self.stop.received_signal if launch.world_size() == 1 else self.agreed.signal
        return bool(wish)

    def _leave_out(self, spikes: list[LossSpike]) -> None:
        """Say which SAEs' step was left out; SaetrainError after too many in a row."""
        for spike in spikes:
            log_rank0(f"{spike}; the step is left out (--on_spike skip)")
            if spike.step != self._last_left_out:
                self._left_out = self._left_out + 1 if spike.step == self._last_left_out + 1 else 1
                self._last_left_out = spike.step
        if spikes and self._left_out >= MOST_LEFT_OUT:
            before = self._last_left_out - self._left_out
            kept = distributed.run_on_rank0("looking for a good checkpoint", lambda: self._last_good(before))
            raise SaetrainError(
                f"{spikes[0]}; {MOST_LEFT_OUT} steps in a row were left out, so the weights themselves are ruined. "
                f"{kept}; start a run of another --run_name with a lower --lr"
            )

    def _stopped_by(self, spike: LossSpike) -> SaetrainError:
        """The batch's place is written down, and the message says what to do."""
        place = self.together.place(dict(self._places)[spike.step])
        return SaetrainError(
            distributed.run_on_rank0("writing down the spike", lambda: self._write_spike(spike, place))
        )

    def _write_spike(self, spike: LossSpike, place: State) -> str:
        path = self.directory / SPIKE
        with self.writing():
            write_json(path, {**spike.facts, "shards": self.feed.shown(place)})
        return (
            f"{spike}; the batch's place is in {path}. {self._last_good(spike.step - 1)}: start again with "
            "--resume --on_spike skip, or with a lower --lr under another --run_name"
        )

    def _last_good(self, step: int) -> str:
        """Set a checkpoint aside that was saved at ``step``, right before a spike; says what is kept.

        The update that ruins the weights shows in the loss of the step behind it.
        """
        if self.saved_step is None:
            return "There is no checkpoint yet"
        with self.writing():
            before = rename_suspect(self.directory / CHECKPOINTS, step)
        if before is None:
            return "The last checkpoint is kept"
        return (
            f"The checkpoint of step {step}, which may be what ruined it, is set aside, and that of step {before} kept"
        )

    def _every(self, steps: int) -> bool:
        return steps > 0 and self.trainer.step % steps == 0

    def _overdue(self) -> bool:
        """Whether rank 0's clock says so, as it was when the step began."""
        return bool(self.agreed.late) if launch.world_size() > 1 else self._late()

    def _late(self) -> bool:
        return self.first and time.monotonic() - self.saved_at > 60 * MAX_INTERVAL_MINUTES

    def _log_step(self, speed: Throughput) -> dict[str, float] | None:
        """Log the step when a sink wants it; gives the first SAE's figures for the progress line."""
        trainer = self.trainer
        if not self.agreed.asked:
            return None
        # Its figures are waited for, so its verdict costs no further wait.
        self._hear(trainer.drain_spikes())
        rate = speed.read(trainer.tokens_seen)
        ranks = self.ranks.read(trainer.tokens_seen / launch.world_size(), self.prepared.model.device)
        saes = self.together.merged(trainer.compute_metrics())
        if not self.first:
            return None
        with self.writing():
            self.log.write(
                MetricsRecord("train", trainer.step, trainer.tokens_seen, {"tokens_per_second": rate, **ranks}, saes)
            )
        return {**next(iter(saes.values())), "tokens_per_second": rate}

    def subjects(self) -> dict[str, EvalTarget]:
        """The SAEs as they would be saved now: folded, for raw activations."""
        found = {}
        for name, sae in self.trainer.saes.items():
            inputs = self.normalizers[sae.hookpoint]
            coder = fold_normalizer(sae.coder, inputs.mean, inputs.scale, inputs.axes)
            found[name] = EvalTarget(sae.hookpoint, coder, inputs.mean)
        return found

    def evaluate(self, kind: Literal["eval", "final"]) -> dict[str, dict[str, float]]:
        """Held-out figures of all SAEs, logged."""
        if kind == "final":
            log_rank0(f"scoring on {self.config.evaluation.eval_tokens:,} held-out tokens")
        figures = {}
        # Where every rank has the same SAEs, one of them scores.
        if self.first or self.prepared.division.owners:
            with distributed.phase("scoring"):
                figures = evaluate_coders(
                    self.subjects(),
                    held_out_batches(self.prepared),
                    self.config.evaluation.eval_tokens,
                    self.config.dead.dead_percentage_threshold,
                )
        figures = self.together.merged(figures)
        with self.writing():
            self.log.write(MetricsRecord(kind, self.trainer.step, self.trainer.tokens_seen, {}, figures))
        return figures

    def assess(self) -> None:
        """Score the SAEs as they were saved, as `saetrain evaluate` would; the verdict and its figures are logged."""
        config = self.config
        log_rank0(
            "assessing the SAEs on held-out text (--assess false leaves it out; `saetrain evaluate` does it later)"
        )
        asked = EvaluateConfig(
            path=str(self.directory), scoring=config.scoring, health=config.health, base=config.base, model=config.model
        )
        try:
            assessment = evaluate_saved(asked, most=config.evaluation.eval_tokens)
        except SaetrainError as error:
            # What was trained is saved and scored by then.
            log_rank0(f"the assessment could not be made: {error}")
            return
        with self.writing():
            self.log.write(
                MetricsRecord("assessment", self.trainer.step, self.trainer.tokens_seen, {}, assessment.logged())
            )

    def save(self) -> None:
        """Write a checkpoint of everything that the rest of the run depends on; rank 0 does."""
        self.together.require_equal(self.trainer)
        tensors = self.together.tensors(
            {name: sae.state_dict() for name, sae in self.trainer.saes.items()}, "sending states"
        )
        tensors.update({f"normalizer:{name}": value.tensor_constants() for name, value in self.normalizers.items()})
        values = {
            "settings": self.settings,
            "identity": identity(self.prepared),
            "normalizers": {name: value.scalar_constants() for name, value in self.normalizers.items()},
            "rates": self.together.merged(
                {name: [sae.peak_lr, sae.firing.window_tokens] for name, sae in self.trainer.saes.items()}
            ),
            "losses": self.together.merged({name: sae.recent_losses() for name, sae in self.trainer.saes.items()}),
            "buffer": self.together.place(self.place),
            "logs": self.log.state_dict(),
            "world_size": launch.world_size(),
            "asked_batch": self.asked_batch,
            "asked_lr": self.asked_lr,
        }
        if self.first:
            with self.writing(), distributed.phase("writing a checkpoint"):
                self.log.sync_to_disk()
                save_checkpoint(self.directory / CHECKPOINTS, self.trainer.step, tensors, values)
        # Nobody goes on, or leaves, before the checkpoint is whole.
        distributed.barrier("waiting for rank 0: writing a checkpoint")
        self.saved_at, self.saved_step = time.monotonic(), self.trainer.step

    def save_saes(self, figures: dict[str, dict[str, float]]) -> None:
        """Write the directories of the finished SAEs; rank 0 does."""
        about = about_run(self.prepared, self.trainer)
        weights = {name: dict(subject.coder.named_parameters()) for name, subject in self.subjects().items()}
        for name, tensors in self.together.tensors(weights, "sending SAEs").items():
            hookpoint, seed = self.together.names[name]
            metadata = {
                **about,
                "hookpoint": hookpoint,
                "hook_name": hook_name(self.prepared, hookpoint),
                "init_seed": seed,
                "norm_limit": self.prepared.reader.norm_limits.get(hookpoint),
                "held_out_figures": replace_non_finite(figures[name]),
            }
            coder = TopK.from_weights(tensors, self.config.sae.k)
            with self.writing():
                save_sae(self.directory / SAES / name, coder, metadata, self.config.output.save_sparsify)

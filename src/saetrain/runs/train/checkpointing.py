"""Checkpoints of a run: when they are written, what they contain, and what a loss spike does to them."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from contextlib import AbstractContextManager
from typing import Any

from saetrain import distributed
from saetrain.atomic_io import write_json
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.logs import MetricsLogger
from saetrain.logs.console import log_rank0
from saetrain.runs.run_dir import CHECKPOINTS_DIR, SPIKE_FILE, report_write_errors
from saetrain.runs.train.batches import BatchSource, BatchSourceState
from saetrain.runs.train.builders import TrainingRun
from saetrain.runs.train.gather import RankGather
from saetrain.runs.train.resume import content_hashes
from saetrain.training.checkpoint import (
    MAX_INTERVAL_MINUTES,
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    rename_suspect,
    save_checkpoint,
)
from saetrain.training.loss_spikes import LossSpike
from saetrain.training.sae_state import DEVICE_LAG_STEPS
from saetrain.training.trainer import EndedSae

MAX_SKIPPED_STEPS = 10
"""Number of consecutive steps that --on_spike skip skips before the run fails."""


class Checkpointing:
    """Writes the checkpoints of a run, and sets them aside after loss spikes."""

    def __init__(self, run: TrainingRun, batch_source: BatchSource) -> None:
        self._run, self._trainer, self._batch_source = run, run.trainer, batch_source
        self._rank_gather, checkpoint = RankGather(run.context), run.checkpoint
        batch, optim = run.context.config.train, run.context.config.optim
        requested = {"asked_batch": [batch.batch_size, batch.grad_acc_steps], "asked_lr": optim.lr}
        # A resumed run keeps what the first start asked for.
        self._requested = {name: checkpoint.values[name] for name in requested} if checkpoint else requested
        self.saved_step: int | None = checkpoint.values["step"] if checkpoint else None
        """Step of the last checkpoint, or None."""
        self._saved_at_s = time.monotonic()
        self._recent_states: deque[tuple[int, BatchSourceState]] = deque(maxlen=DEVICE_LAG_STEPS + 1)
        self._n_skipped, self._last_skipped_step = 0, -1

    def report_write_errors(self) -> AbstractContextManager[None]:
        """Convert errors of writing to a SaetrainError that names the step."""
        return report_write_errors(self._run.directory, f"at step {self._trainer.step}", self.saved_step is not None)

    def is_overdue(self) -> bool:
        """Return whether rank 0 should write a checkpoint because of the time since the last one."""
        return env.rank() == 0 and time.monotonic() - self._saved_at_s > 60 * MAX_INTERVAL_MINUTES

    def record_batch(self, step: int, state: BatchSourceState) -> None:
        """Keep the state of the batch source before ``step``, for the message about a spike in that step."""
        self._recent_states.append((step, state))

    def save_if_good(self, batches: BatchSourceState, log: MetricsLogger) -> None:
        """Write a checkpoint unless the last step was skipped; ``batches``: the state of the batch source."""
        self.handle_spikes(self._trainer.drain_spikes())
        # After a skipped step the weights may be ruined; only a good step shows that they are not.
        if self._last_skipped_step != self._trainer.step:
            self._write_checkpoint(batches, log)

    def _write_checkpoint(self, batches: BatchSourceState, log: MetricsLogger) -> None:
        """Write a checkpoint of everything that the rest of the run depends on; only rank 0 writes files."""
        saes, gather = self._trainer.saes, self._rank_gather
        gather.require_equal_weights(self._trainer)
        tensors = gather.gather_tensors({name: sae.state_dict() for name, sae in saes.items()}, "sending states")
        tensors.update(
            {f"normalizer:{name}": value.tensor_constants() for name, value in self._run.normalizers.items()}
        )
        values = {
            "settings": self._run.settings,
            "identity": content_hashes(self._run.context),
            "normalizers": {name: value.scalar_constants() for name, value in self._run.normalizers.items()},
            "norm_limits": self._run.context.extractor.norm_limits,
            "resolved": dataclasses.asdict(self._run.context.resolved),
            "ended": {name: dataclasses.asdict(each) for name, each in self._trainer.ended.items()},
            "losses": gather.gather_entries({name: sae.recent_losses() for name, sae in saes.items()}),
            "buffer": gather.gather_states(batches),
            "logs": log.state_dict(),
            "world_size": env.world_size(),
            **self._requested,
        }
        if env.rank() == 0:
            with self.report_write_errors(), distributed.phase("writing a checkpoint"):
                log.sync_to_disk()
                save_checkpoint(self._run.directory / CHECKPOINTS_DIR, self._trainer.step, tensors, values)
        # No rank continues or exits before the checkpoint is complete.
        distributed.barrier("waiting for rank 0: writing a checkpoint")
        self._saved_at_s, self.saved_step = time.monotonic(), self._trainer.step

    def handle_spikes(self, own: list[LossSpike]) -> None:
        """Stop at, or log, the loss spikes of all ranks; ``own``: the spikes of this rank's SAEs.

        With --on_spike stop, an SAE ends at its spike, and the run stops if no other SAE is left.
        """
        spikes = sorted(self._rank_gather.gather_spikes(own), key=lambda spike: spike.step)
        if spikes and self._run.context.config.train.on_spike == "stop":
            ending = {spike.sae for spike in spikes}
            if len(ending | self._trainer.ended.keys()) < len(self._run.context.plans):
                for name in sorted(ending):
                    self._end_sae(next(spike for spike in spikes if spike.sae == name))
                return
            state = self._rank_gather.gather_states(dict(self._recent_states)[spikes[0].step])
            text = distributed.run_on_rank0(
                "writing spike.json", lambda: self._write_spike(spikes[0], self._batch_source.describe_state(state))
            )
            raise SaetrainError(text)
        self._log_skipped_steps(spikes)

    def _end_sae(self, spike: LossSpike) -> None:
        """End an SAE at its spike, with the weights of the last checkpoint that the spike can't have spoiled.

        The update that ruins the weights shows in the loss of the next step. Without a checkpoint, the SAE keeps its
        weights.
        """
        found = self._find_good_checkpoint(spike) if env.rank() == 0 else None
        kept = None if found is None else [found.values["step"], found.values["losses"][spike.sae]]
        kept = distributed.broadcast_from_rank0(kept, "reading the last good weights")
        step = spike.step - 1
        if kept is not None:
            step, losses = kept
            tensors = None if found is None else found.tensors[spike.sae]
            tensors = distributed.broadcast_tensors(tensors, "sending the last good weights")
            if spike.sae in self._trainer.saes:
                self._trainer.saes[spike.sae].load_state_dict(tensors, losses)
        self._trainer.ended[spike.sae] = EndedSae(spike.step, step)
        log_rank0(
            f"{spike}; this SAE ends here with the weights of step {step}, and the others continue (--on_spike stop)"
        )

    def _find_good_checkpoint(self, spike: LossSpike) -> Checkpoint | None:
        """Return the newest checkpoint from before the update that a spike shows, or else the newest one, if any."""
        paths = list_checkpoints(self._run.directory / CHECKPOINTS_DIR) if self.saved_step is not None else []
        for path in reversed(paths):
            checkpoint = load_checkpoint(path)
            if checkpoint.values["step"] < spike.step - 1 or path == paths[0]:
                return checkpoint
        return None

    def _write_spike(self, spike: LossSpike, shards: dict[str, Any]) -> str:
        """Write the position of the spike's batch to spike.json, and return the error with advice."""
        path = self._run.directory / SPIKE_FILE
        with self.report_write_errors():
            write_json(path, {**spike.facts, "shards": shards})
        return (
            f"{spike}; the batch's position is in {path}. {self._set_aside_last_checkpoint(spike.step - 1)}: restart "
            "with --resume --on_spike skip, or start another --run_name with a lower --lr"
        )

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

    def _set_aside_last_checkpoint(self, step: int) -> str:
        """Rename the last checkpoint if it was saved at ``step``, right before a spike; return what is kept.

        The update that ruins the weights shows in the loss of the next step.
        """
        if self.saved_step is None:
            return "There is no checkpoint yet"
        with self.report_write_errors():
            before = rename_suspect(self._run.directory / CHECKPOINTS_DIR, step)
        if before is None:
            return "The last checkpoint is kept"
        return f"The checkpoint of step {step} may be the cause, so it is set aside, and that of step {before} is kept"

"""What a run reports: metrics of its steps, evaluations on held-out text, and the assessment at its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

from saetrain import distributed
from saetrain.config import EvaluateConfig
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.evaluation.evaluator import evaluate_coders
from saetrain.logs import MetricsLogger
from saetrain.logs.base import MetricsRecord, RunInfo
from saetrain.logs.console import ProgressLine, log_rank0
from saetrain.runs.evaluate.run import evaluate_saes
from saetrain.runs.train.builders import TrainingRun
from saetrain.runs.train.gather import RankGather
from saetrain.runs.train.rank_metrics import RankMetrics
from saetrain.runs.train.saving import fold_coders
from saetrain.runs.train.setup import held_out_batches
from saetrain.training.trainer import Throughput


class Reporting:
    """The logs and the progress line of a run; each write is done within ``report_write_errors()``."""

    def __init__(self, run: TrainingRun, report_write_errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._run, self._trainer, checkpoint = run, run.trainer, run.checkpoint
        self._report_write_errors, self._rank_gather = report_write_errors, RankGather(run.context)
        info = RunInfo(
            run_dir=run.directory,
            name=run.directory.name,
            settings=run.settings,
            total_steps=run.trainer.total_steps,
            resumed_step=checkpoint.values["step"] if checkpoint else None,
            sink_state=checkpoint.values["logs"] if checkpoint else {},
        )
        with report_write_errors():
            self.log = MetricsLogger(run.context.config.logs, info, disabled=env.rank() != 0)
        distributed.on_peer_failure(lambda: self.log.close(failed=True))
        self._rank_metrics, self._speed = RankMetrics(), Throughput(run.trainer.tokens_seen)
        self.progress_line = ProgressLine(run.trainer.total_steps, run.trainer.step)

    def wants_metrics(self, step: int) -> bool:
        """Return whether this rank needs the metrics of ``step``."""
        return self.log.should_log(step) or self.progress_line.should_print(step)

    def log_step(self, *, wants_metrics: bool) -> None:
        """Log the last step if a rank wants its metrics, and update the progress line."""
        trainer = self._trainer
        if not wants_metrics:
            self.progress_line.update(trainer.step, None)
            return
        rate = self._speed.read(trainer.tokens_seen)
        rank_values = self._rank_metrics.read(trainer.tokens_seen / env.world_size(), self._run.context.model.device)
        saes = self._rank_gather.gather_entries(trainer.compute_metrics())
        if env.rank() == 0:
            self._write("train", saes, {"tokens_per_second": rate, **rank_values})
            self.progress_line.update(trainer.step, {**next(iter(saes.values())), "tokens_per_second": rate})

    def restart_speed(self) -> None:
        """Measure the speed from now on."""
        self._speed = Throughput(self._trainer.tokens_seen)

    def evaluate_held_out(self, kind: Literal["eval", "final"]) -> dict[str, dict[str, float]]:
        """Evaluate all SAEs on held-out text, log their metrics, and return them."""
        config = self._run.context.config
        if kind == "final":
            log_rank0(f"evaluating on up to {config.evaluation.eval_tokens:,} held-out tokens")
        metrics = {}
        # If every rank has the same SAEs, only rank 0 evaluates them.
        if env.rank() == 0 or self._run.context.placement.owners:
            with distributed.phase("scoring"):
                scores = evaluate_coders(
                    fold_coders(self._trainer, self._run.normalizers),
                    held_out_batches(self._run.context),
                    config.dead.dead_percentage_threshold,
                    config.evaluation.eval_tokens,
                )
            metrics = {name: found.to_log_record() for name, found in scores.items()}
        metrics = self._rank_gather.gather_entries(metrics)
        self._write(kind, metrics)
        return metrics

    def assess_saved_saes(self) -> None:
        """Evaluate the saved SAEs as `saetrain evaluate` would, and log their verdicts and metrics."""
        config = self._run.context.config
        log_rank0(
            "assessing the SAEs on held-out text (--assess false skips this; `saetrain evaluate` can do it later)"
        )
        eval_config = EvaluateConfig(
            path=str(self._run.directory),
            scoring=config.scoring,
            health=config.health,
            base=config.base,
            model=config.model,
        )
        try:
            assessment = evaluate_saes(eval_config, max_eval_tokens=config.evaluation.eval_tokens)
        except SaetrainError as error:
            # The trained SAEs are already saved and evaluated.
            log_rank0(f"the assessment failed: {error}")
            return
        self._write("assessment", assessment.to_log_record())

    def close(self, *, failed: bool) -> None:
        """Close the logs."""
        with self._report_write_errors():
            self.log.close(failed)

    def _write(
        self, kind: Literal["train", "eval", "final", "assessment"], saes: dict[str, Any], values: Any = None
    ) -> None:
        with self._report_write_errors():
            self.log.write(MetricsRecord(kind, self._trainer.step, self._trainer.tokens_seen, values or {}, saes))

"""What a run reports: metrics of its steps, evaluations on held-out text, and the assessment at its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

from saetrain import distributed
from saetrain.config import EvaluateConfig, FeaturesConfig, ReportConfig
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.evaluation.evaluator import evaluate_coders
from saetrain.logs import MetricsLogger
from saetrain.logs.base import MetricsRecord, RunInfo
from saetrain.logs.console import ProgressLine, log_rank0, open_bar
from saetrain.report.build import report_run
from saetrain.runs.evaluate.run import evaluate_saes
from saetrain.runs.features import collect_features
from saetrain.runs.train.batches import BatchSource
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
        steps_left = run.trainer.total_steps - run.trainer.step
        fill_tokens = steps_left * run.context.resolved.tokens_per_step / env.world_size()
        self.progress_line = ProgressLine(run.trainer.total_steps, run.trainer.step, fill_tokens)

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

    def start_timing(self, batch_source: BatchSource) -> None:
        """Measure the speed and the time from now on, and show the first filling of the shuffle buffer."""
        self._speed = Throughput(self._trainer.tokens_seen)
        self.progress_line.start_timing(batch_source.report_fills(self.progress_line.record_fill))

    def evaluate_held_out(self, kind: Literal["eval", "final"]) -> dict[str, dict[str, float]]:
        """Evaluate all SAEs on held-out text, log their metrics, and return them."""
        config = self._run.context.config
        if kind == "final":
            tokens = min(config.evaluation.eval_tokens, self._run.context.held_out.text_tokens)
            log_rank0(f"evaluating on up to {tokens:,} held-out tokens")
        metrics = {}
        # If every rank has the same SAEs, only rank 0 evaluates them.
        if env.rank() == 0 or self._run.context.resolved.placement.owners:
            tokens = min(config.evaluation.eval_tokens, self._run.context.held_out.text_tokens)
            with distributed.phase("scoring"), open_bar("scoring", tokens) as bar:
                scores = evaluate_coders(
                    fold_coders(self._trainer, self._run.normalizers),
                    held_out_batches(self._run.context),
                    config.dead.dead_percentage_threshold,
                    config.evaluation.eval_tokens,
                    on_progress=bar.update,
                )
            metrics = {name: found.to_log_record() for name, found in scores.items()}
        metrics = self._rank_gather.gather_entries(metrics)
        self._write(kind, metrics)
        return metrics

    def assess_saved_saes(self) -> None:
        """Evaluate the saved SAEs as `saetrain evaluate` would, and log their verdicts and metrics."""
        config = self._run.context.config
        log_rank0("assessing the SAEs on held-out text (--assess false skips this)")
        eval_config = EvaluateConfig(
            path=str(self._run.directory),
            scoring=config.scoring,
            health=config.health,
            base=config.base,
            model=config.model,
            details=False,
        )
        try:
            assessment = evaluate_saes(eval_config, max_eval_tokens=config.evaluation.eval_tokens)
        except SaetrainError as error:
            # The trained SAEs are already saved and evaluated.
            log_rank0(f"the assessment failed: {error}")
            return
        self._write("assessment", assessment.to_log_record())

    def collect_features(self) -> None:
        """Collect the features of the saved SAEs as `saetrain features` would."""
        config = self._run.context.config
        log_rank0("collecting features (--feature_tokens 0 skips this; `saetrain features` can do it later)")
        features_config = FeaturesConfig(
            path=str(self._run.directory), features=config.features, base=config.base, model=config.model
        )
        try:
            collect_features(features_config, is_in_run=True)
        except SaetrainError as error:
            # The trained SAEs are already saved and evaluated.
            log_rank0(f"the collection of features failed: {error}")

    def write_page(self) -> None:
        """Write report.html; an error does not fail the run, because everything else is already saved."""
        try:
            report_run(ReportConfig(run=str(self._run.directory)))
        except SaetrainError as error:
            log_rank0(f"the report failed: {error}")

    def close(self, *, failed: bool) -> None:
        """Close the logs."""
        with self._report_write_errors():
            self.log.close(failed)

    def _write(
        self, kind: Literal["train", "eval", "final", "assessment"], saes: dict[str, Any], values: Any = None
    ) -> None:
        with self._report_write_errors():
            self.log.write(MetricsRecord(kind, self._trainer.step, self._trainer.tokens_seen, values or {}, saes))

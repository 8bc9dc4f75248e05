"""Logs of metrics: sinks with one interface. ``metrics.jsonl`` is always written and is the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from saetrain.logs.base import MetricsRecord, RunInfo, Sink
from saetrain.logs.jsonl import JsonLinesSink
from saetrain.logs.tensorboard import TensorBoardSink
from saetrain.logs.wandb import WandBSink
from saetrain.settings import Settings, Total


@dataclass(frozen=True, kw_only=True)
class LogSettings(Settings):
    """Logging."""

    log_every: Total = 10
    """Optimizer steps between entries in metrics.jsonl and TensorBoard."""
    log_to_wandb: bool = False
    """Also log to Weights & Biases (install the extra `wandb`). WANDB_MODE=offline works."""
    wandb_log_frequency: Total = 100
    """Optimizer steps between points in Weights & Biases."""
    wandb_project: str = "saetrain"
    """Project in Weights & Biases."""
    log_to_tensorboard: bool = False
    """Also write TensorBoard files to the run directory (install the extra `tensorboard`)."""


SINKS: dict[str, Callable[[LogSettings, RunInfo], Sink | None]] = {
    "jsonl": lambda settings, info: JsonLinesSink(info, settings.log_every),
    "wandb": lambda settings, info: (
        WandBSink(info, settings.wandb_log_frequency, settings.wandb_project) if settings.log_to_wandb else None
    ),
    "tensorboard": lambda settings, info: (
        TensorBoardSink(info, settings.log_every) if settings.log_to_tensorboard else None
    ),
}
"""Name -> function that opens the sink, or returns None if it is not enabled."""


def require_log_packages(settings: LogSettings) -> None:
    """Raise SaetrainError if the package of an enabled sink is not installed. Called before anything slow."""
    if settings.log_to_wandb:
        WandBSink.require_installed()
    if settings.log_to_tensorboard:
        TensorBoardSink.require_installed()


class MetricsLogger:
    """All open sinks as one; with ``disabled``, no sink is opened."""

    def __init__(self, settings: LogSettings, info: RunInfo, *, disabled: bool = False) -> None:
        openers = () if disabled else SINKS.values()
        self.sinks = [sink for open_sink in openers if (sink := open_sink(settings, info)) is not None]

    def should_log(self, step: int) -> bool:
        """Return whether any sink logs the training metrics of ``step``."""
        return any(sink.should_log(step) for sink in self.sinks)

    def write(self, record: MetricsRecord) -> None:
        """Write ``record`` to each sink that logs its step; all sinks log evaluations."""
        for sink in self.sinks:
            if record.kind != "train" or sink.should_log(record.step):
                sink.write(record)

    def state_dict(self) -> dict[str, str]:
        """Return what the sinks need to continue after a restart, such as a run id."""
        return {key: value for sink in self.sinks for key, value in sink.state_dict().items()}

    def sync_to_disk(self) -> None:
        """Sync all written records to disk, so that they survive a crash. Called before a checkpoint."""
        for sink in self.sinks:
            sink.sync_to_disk()

    def close(self, failed: bool = False) -> None:
        """Flush and close the sinks; with ``failed``, Weights & Biases marks the run as failed."""
        for sink in self.sinks:
            sink.close(failed)

"""Base class of log sinks, and the records and run information that they take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FINAL_KINDS = ("final", "assessment")
"""Kinds of the last records of a run."""


@dataclass(frozen=True)
class MetricsRecord:
    """Metrics after one optimizer step: ``run_metrics`` {name: value} and ``sae_metrics`` {SAE: {name: value}}.

    ``tokens`` is the number of tokens trained on so far.
    """

    kind: Literal["train", "eval", "final", "assessment"]
    step: int
    tokens: int
    run_metrics: Mapping[str, float] = field(default_factory=dict)
    sae_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_flat_dict(self) -> dict[str, float]:
        """Return ``{"train/tokens_per_second": …, "train/<SAE>/fvu": …}``, for sinks without nesting."""
        out = {f"{self.kind}/{name}": value for name, value in self.run_metrics.items()}
        for sae, metrics in self.sae_metrics.items():
            out.update({f"{self.kind}/{sae}/{name}": value for name, value in metrics.items()})
        return {"tokens": self.tokens, **out}


@dataclass(frozen=True)
class RunInfo:
    """What a sink knows about the run: its folder, name, settings, length and resumed step."""

    run_dir: Path
    name: str
    settings: Mapping[str, Any]
    total_steps: int
    """Optimizer steps of the whole run."""
    resumed_step: int | None
    """Optimizer steps of the checkpoint from which the run continues; None for a new run."""
    sink_state: Mapping[str, str]
    """Result of :meth:`Sink.state_dict` before the restart."""


class Sink(ABC):
    """Destination of metrics; it logs training metrics every ``every_n_steps`` optimizer steps and at ``last_step``."""

    def __init__(self, every_n_steps: int, last_step: int) -> None:
        self._every_n_steps, self._last_step = every_n_steps, last_step

    def should_log(self, step: int) -> bool:
        """Return whether this sink logs the training metrics of ``step`` (counted from 1)."""
        return step % self._every_n_steps == 0 or step == self._last_step

    @abstractmethod
    def write(self, record: MetricsRecord) -> None:
        """Write a record."""

    def state_dict(self) -> dict[str, str]:
        """Return what the sink needs to continue after a restart."""
        return {}

    def sync_to_disk(self) -> None:  # noqa: B027 (most sinks have nothing to do)
        """Sync all written records to disk, so that they survive a crash of the machine."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Flush and close the sink; ``failed`` is True after an error."""

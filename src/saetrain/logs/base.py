"""What a log sink is, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FINAL_KINDS = ("final", "assessment")
"""Kinds of record that a run ends with."""


@dataclass(frozen=True)
class MetricsRecord:
    """Figures of one optimizer step: ``run`` of the whole pass, ``saes`` {SAE: {name: value}}."""

    kind: Literal["train", "eval", "final", "assessment"]
    step: int
    tokens: int
    run_metrics: Mapping[str, float] = field(default_factory=dict)
    sae_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_flat_dict(self) -> dict[str, float]:
        """``{"train/lr": …, "train/<SAE>/fvu": …}``, for sinks without nesting."""
        out = {f"{self.kind}/{name}": value for name, value in self.run_metrics.items()}
        for sae, metrics in self.sae_metrics.items():
            out.update({f"{self.kind}/{sae}/{name}": value for name, value in metrics.items()})
        return {"tokens": self.tokens, **out}


@dataclass(frozen=True)
class RunInfo:
    """What a sink may know of the run: where it lies, its name, its settings, and where it was resumed."""

    run_dir: Path
    name: str
    settings: Mapping[str, Any]
    total_steps: int
    """Optimizer steps of the whole run."""
    resumed_step: int | None
    """Steps done by the checkpoint that the run goes on from; None for a fresh run."""
    sink_state: Mapping[str, str]
    """What :meth:`Sink.state` gave before the restart."""


class Sink(ABC):
    """Somewhere that figures go; it wants training figures every ``every`` optimizer steps, and of the ``last``."""

    def __init__(self, every_n_steps: int, last_step: int) -> None:
        self._every_n_steps, self._last_step = every_n_steps, last_step

    def should_log(self, step: int) -> bool:
        """Whether this sink wants the training figures of ``step`` (counted from 1)."""
        return step % self._every_n_steps == 0 or step == self._last_step

    @abstractmethod
    def write(self, record: MetricsRecord) -> None:
        """Take a record."""

    def state_dict(self) -> dict[str, str]:
        """What the sink needs to go on after a restart."""
        return {}

    def sync_to_disk(self) -> None:  # noqa: B027 (most sinks have nothing to do)
        """Make what was written survive a crash of the machine."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Flush and close."""

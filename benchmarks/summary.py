"""Records of cases -> medians, quartiles and ratios, from which tables and plots are made."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of some numbers."""

    median: float
    low: float
    high: float

    @staticmethod
    def from_values(values: list[float]) -> Quartiles | None:
        """Quartiles of ``values``, or None if there are none."""
        if not values:
            return None
        if len(values) == 1:
            return Quartiles(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Quartiles(median, low, high)

    def format(self, digits: int, unit: float = 1.0) -> str:
        """Format as ``median [low, high]``."""
        median, low, high = (f"{value * unit:,.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median} [{low}, {high}]"


@dataclass(frozen=True)
class Row:
    """One tool in one case; ``rounds`` maps each round with a kept sample to its mean seconds per step."""

    tool: Record
    tokens: int
    rounds: dict[int, float]

    @property
    def seconds_per_step(self) -> Quartiles | None:
        """Quartiles over the rounds."""
        return Quartiles.from_values(list(self.rounds.values()))

    @property
    def tokens_per_second(self) -> float:
        """Speed at the median; 0 without a sample."""
        return self.tokens / self.seconds_per_step.median if self.seconds_per_step else 0.0

    @property
    def sample_counts(self) -> str:
        """Format as ``kept (dropped)``."""
        return f"{len(self.rounds)} ({self.tool['dropped']})"

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of the process, less its memory after the imports."""
        peak: int | None = self.tool["peak_bytes"]
        return peak

    def speed_over(self, other: Row) -> Quartiles | None:
        """Speed relative to ``other``, from pairs of the same round."""
        shared = self.rounds.keys() & other.rounds.keys()
        return Quartiles.from_values([other.rounds[number] / self.rounds[number] for number in sorted(shared)])


def read_rows(case: Record) -> list[Row]:
    """The rows of a case, one per tool."""
    return [
        Row(
            tool,
            case["work"]["tokens"],
            {number: seconds for number, seconds in enumerate(tool["seconds_per_step"]) if seconds is not None},
        )
        for tool in case["tools"]
    ]


def find_fastest_peer(rows: list[Row], **changes: str) -> Row | None:
    """The fastest peer among those with these changes of the workload (among all, if none are given)."""
    peers = [row for row in rows if row.tool["peer"] and row.rounds and changes.items() <= row.tool["changes"].items()]
    return max(peers, key=lambda row: row.tokens_per_second, default=None)


def find_row(rows: list[Row], name: str) -> Row | None:
    """The row of the tool with this name, if it has a sample."""
    return next((row for row in rows if row.tool["name"] == name and row.rounds), None)

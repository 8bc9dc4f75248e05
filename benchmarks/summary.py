"""Samples -> medians, quartiles and ratios: what tables and pictures are made of."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread | None:
        """The spread of the numbers, or None where there are none."""
        if not values:
            return None
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def show(self, digits: int, unit: float = 1.0) -> str:
        """``median [low, high]``."""
        median, low, high = (f"{value * unit:,.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median} [{low}, {high}]"


@dataclass(frozen=True)
class Row:
    """One tool in one case; ``rounds`` {round: mean seconds per step} of the samples that were kept."""

    tool: Record
    tokens: int
    rounds: dict[int, float]

    @property
    def spread(self) -> Spread | None:
        """Of the seconds per step."""
        return Spread.of(list(self.rounds.values()))

    @property
    def rate(self) -> float:
        """Tokens per second at the median; 0 without a sample."""
        return self.tokens / self.spread.median if self.spread else 0.0

    @property
    def counts(self) -> str:
        """Samples that were kept, and those that were dropped."""
        dropped = sum(sample["dropped"] for sample in self.tool["samples"])
        return f"{len(self.tool['samples']) - dropped} ({dropped})"

    @property
    def peak(self) -> int | None:
        """Peak memory over the imports, in bytes."""
        return max((sample["peak_bytes"] for sample in self.tool["samples"]), default=None)

    def over(self, other: Row) -> Spread | None:
        """How many times as fast as the other, from pairs in the same round."""
        shared = self.rounds.keys() & other.rounds.keys()
        return Spread.of([other.rounds[number] / self.rounds[number] for number in sorted(shared)])


def rows(case: Record) -> list[Row]:
    """The rows of a case."""
    found = []
    for tool in case["tools"]:
        kept = {s["round"]: statistics.fmean(s["seconds"]) for s in tool["samples"] if not s["dropped"]}
        found.append(Row(tool, case["work"]["tokens"], kept))
    return found


def rival(found: list[Row], **changes: str) -> Row | None:
    """The fastest peer among those whose work was changed like that (any, where nothing is given)."""
    peers = [row for row in found if row.tool["peer"] and row.rounds and changes.items() <= row.tool["changes"].items()]
    return max(peers, key=lambda row: row.rate, default=None)


def named(found: list[Row], name: str) -> Row | None:
    """The row of the tool of that name, where it has a sample."""
    return next((row for row in found if row.tool["name"] == name and row.rounds), None)

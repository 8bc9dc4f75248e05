"""The rates of a sweep, and the tasks of a comparison of tools."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.recipe.results import Results
from benchmarks.recipe.task import Task

SAETRAIN = "saetrain"
FACTOR = 2.0
"""Ratio of neighbouring rates of a sweep."""


def next_rates(tried: Mapping[float, float], first: float) -> list[float]:
    """Rates to try after ``tried`` {rate: FVU}; empty once both neighbours of the best rate are known."""
    if not tried:
        return [_round_rate(first)]
    best = best_rate(tried)
    return [rate for rate in (_round_rate(best * FACTOR), _round_rate(best / FACTOR)) if rate not in tried]


def is_settled(tried: Mapping[float, float]) -> bool:
    """Whether both neighbours of the best rate are known."""
    return bool(tried) and not next_rates(tried, min(tried))


def best_rate(tried: Mapping[float, float]) -> float:
    """The rate with the lowest FVU."""
    return min(tried, key=lambda rate: tried[rate])


def _round_rate(rate: float) -> float:
    """Round away the last bits, so that equal rates compare equal."""
    return float(f"{rate:.6g}")


@dataclass(frozen=True)
class Tool:
    """A tool with its options, and the first rate of its sweep over the shortest runs."""

    name: str
    first_lr: float | None = None
    options: tuple[tuple[str, Any], ...] = ()
    shipped: bool = True
    """Whether these options are the tool's defaults, whose results then have a row."""
    architectures: tuple[str, ...] = ("topk",)
    """Architectures that it can train to a wanted L0."""
    longest_sweep: float = float("inf")
    """Steps of the longest runs for which the rate is swept."""

    def is_swept(self, steps: int) -> bool:
        """Whether the rate is swept for runs of this length."""
        return self.first_lr is not None and steps <= self.longest_sweep


TOOLS = (
    Tool(SAETRAIN, architectures=("topk", "batchtopk", "matryoshka", "jumprelu", "standard", "abstopk")),
    # At its best rate it is far worse than Adam of the same tool, so the long runs, minutes each, use only Adam.
    Tool("sparsify signum", 8e-3, (("optimizer", "signum"),), longest_sweep=400),
    Tool("sparsify adam", 4e-3, (("optimizer", "adam"),), shipped=False),
    Tool("sae-lens", 4e-3, architectures=("topk", "batchtopk", "matryoshka", "jumprelu", "abstopk")),
    Tool("dictionary_learning", 4e-3, architectures=("topk", "batchtopk", "matryoshka", "jumprelu")),
    # The default window of 10 million tokens is longer than these runs, so the auxiliary loss would never act.
    Tool("dictionary_learning short window", 4e-3, (("dead_window", 4096),), shipped=False, longest_sweep=400),
)


class Comparison:
    """The tasks of a comparison: each tool at its default, and at the best rate of a sweep with the first seed."""

    def __init__(self, make: Callable[..., Task], lengths: tuple[int, ...], seeds: tuple[int, ...]) -> None:
        self._make, self.lengths, self.seeds = make, lengths, seeds

    def default_tasks(self, tool: Tool, steps: int) -> list[Task]:
        """One task per seed at the tool's default; for saetrain, at the rule's rate."""
        return [self._make(tool=tool.name, steps=steps, seed=seed, options=dict(tool.options)) for seed in self.seeds]

    def best_tasks(self, tool: Tool, steps: int, results: Results) -> list[Task] | None:
        """One task per seed at the best rate, or None until the sweep is complete."""
        tasks = self.default_tasks(tool, steps)
        tried = results.tried_rates(tasks[0])
        if not is_settled(tried):
            return None
        return [dataclasses.replace(task, lr=best_rate(tried)) for task in tasks]

    def fp32_task(self, tool: Tool, results: Results) -> Task | None:
        """The first seed's task of the shortest runs at the best rate, with products in fp32."""
        best = self.best_tasks(tool, self.lengths[0], results)
        return dataclasses.replace(best[0], fp32_products=True) if best else None

    def missing_tasks(self, tools: tuple[Tool, ...], results: Results) -> list[Task]:
        """Tasks that can start now, short ones first; empty once the comparison is complete."""
        found: list[Task] = []
        for steps in self.lengths:
            for tool in tools:
                found += self._sweep_tasks(tool, steps, results) if tool.is_swept(steps) else []
            for tool in tools:
                found += self.default_tasks(tool, steps) if tool.shipped else []
        return [task for task in found if results.get(task) is None]

    def _sweep_tasks(self, tool: Tool, steps: int, results: Results) -> list[Task]:
        """The next rates of the sweep, or all seeds at the best rate."""
        best = self.best_tasks(tool, steps, results)
        if best is None:
            rates = self._next_sweep_rates(tool, steps, results)
            return [dataclasses.replace(self.default_tasks(tool, steps)[0], lr=rate) for rate in rates]
        exact = self.fp32_task(tool, results) if steps == self.lengths[0] else None
        return [*best, *([exact] if exact else [])]

    def _next_sweep_rates(self, tool: Tool, steps: int, results: Results) -> list[float]:
        """The next rates of the sweep; for longer runs it starts below the best rate of the shorter runs."""
        assert tool.first_lr is not None
        first = tool.first_lr
        for length in self.lengths:
            if length < steps:
                shorter = self.best_tasks(tool, length, results)
                if shorter is None:
                    return []
                first = (shorter[0].lr or first) / FACTOR
        return next_rates(results.tried_rates(self.default_tasks(tool, steps)[0]), first)

"""Tables and plot of the comparison, from its results file."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.recipe.results import Result, Results
from benchmarks.recipe.sweep import SAETRAIN, TOOLS, Comparison, Tool

HEAD = ["steps", "tool", "learning rate", "FVU", "never fired", "inactive in the last 50 batches"]


@dataclass(frozen=True)
class Row:
    """A tool at one rate and run length, with the results of all seeds."""

    steps: int
    name: str
    rate: str
    seeds: list[Result]

    def mean_over_seeds(self, metric: str) -> float:
        """Mean of the metric over the seeds."""
        return statistics.mean(result[metric] for result in self.seeds)

    def format_cell(self, metric: str, form: str) -> str:
        """Mean over the seeds, with the smallest and the largest value."""
        values = [result[metric] for result in self.seeds]
        spread = f"{min(values):{form}} to {max(values):{form}}" if len(values) > 1 else "one seed"
        return f"{self.mean_over_seeds(metric):{form}} ({spread})"


def comparison_rows(comparison: Comparison, results: Results) -> Iterator[Row]:
    """Yield the rows with at least one result; a tool that failed has an ``error``."""
    for steps in comparison.lengths:
        for tool in TOOLS:
            yield from _tool_rows(comparison, results, tool, steps)


def _tool_rows(comparison: Comparison, results: Results, tool: Tool, steps: int) -> Iterator[Row]:
    best = comparison.best_tasks(tool, steps, results) if tool.is_swept(steps) else None
    default = comparison.default_tasks(tool, steps) if tool.shipped else None
    for what, tasks in (("default", default), ("best", best)):
        found = [results.get(task) for task in tasks or []]
        seeds = [result for result in found if result is not None]
        if seeds:
            lr = f"{seeds[0]['lr']:.2g}" if "lr" in seeds[0] else "none"
            yield Row(steps, tool.name, f"{lr}, {'`--lr auto`' if tool.name == SAETRAIN else what}", seeds)


def comparison_table(comparison: Comparison, results: Results) -> str:
    """All rows, followed by the differences between saetrain and the best other tool, and by wall times."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    found = list(comparison_rows(comparison, results))
    for row in found:
        if any("error" in result for result in row.seeds):
            lines.append(f"| {row.steps} | {row.name} | {row.rate} | fails: {row.seeds[0]['error']} | | |")
            continue
        shares = " | ".join(row.format_cell(metric, ".1%") for metric in ("never_fired", "dead_by_window"))
        lines.append(f"| {row.steps} | {row.name} | {row.rate} | {row.format_cell('fvu', '.4f')} | {shares} |")
    remarks = (_describe_gaps(found), _describe_fp32(comparison, results), _describe_times(comparison, results))
    paragraphs = [textwrap.fill(remark, 120) for each in remarks for remark in each]
    return "\n\n".join(["\n".join(lines), *paragraphs])


def summary_table(comparison: Comparison, results: Results) -> str:
    """One row per tool, at its best rate: means over the seeds, for each run length."""
    found = [row for row in comparison_rows(comparison, results) if not any("error" in each for each in row.seeds)]
    head = ["tool", *(f"{name}, {steps} steps" for steps in comparison.lengths for name in ("FVU", "never fired"))]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(tool.name.split()[0] for tool in TOOLS):
        cells = []
        for steps in comparison.lengths:
            rows = [row for row in found if row.steps == steps and row.name.split()[0] == name]
            best = min(rows, key=lambda row: row.mean_over_seeds("fvu"))
            cells += [f"{best.mean_over_seeds('fvu'):.4f}", f"{best.mean_over_seeds('never_fired'):.1%}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _describe_gaps(found: list[Row]) -> Iterator[str]:
    fine = [row for row in found if not any("error" in result for result in row.seeds)]
    for steps in sorted({row.steps for row in fine}):
        own = next((row for row in fine if (row.steps, row.name) == (steps, SAETRAIN)), None)
        others = [row for row in fine if row.steps == steps and row.name != SAETRAIN]
        if own and others:
            best = min(others, key=lambda row: row.mean_over_seeds("fvu"))
            gap = best.mean_over_seeds("fvu") - own.mean_over_seeds("fvu")
            where = f"{abs(gap):.4f} {'below' if gap > 0 else 'above'} that of the best other tool"
            yield (
                f"After {steps} steps, saetrain's FVU is {where} ({best.name} at {best.rate}). Its share of latents "
                f"that never fire is {own.mean_over_seeds('never_fired'):.1%}, compared with "
                f"{best.mean_over_seeds('never_fired'):.1%}."
            )


def _describe_fp32(comparison: Comparison, results: Results) -> Iterator[str]:
    """Describe how bfloat16 products change the FVU of the other tools."""
    gaps = []
    for tool in TOOLS:
        task = comparison.fp32_task(tool, results) if tool.first_lr is not None else None
        best = comparison.best_tasks(tool, comparison.lengths[0], results) if task else None
        pair = [found for found in (task and results.get(task), best and results.get(best[0])) if found]
        # A tool that refuses the length of the runs has an error instead.
        if len(pair) == 2 and all("fvu" in found for found in pair):
            gaps.append(f"{tool.name} {pair[0]['fvu'] - pair[1]['fvu']:+.4f}")
    if gaps:
        yield f"FVU with products in fp32, minus FVU with products in bfloat16 (one seed): {', '.join(gaps)}."


def _describe_times(comparison: Comparison, results: Results) -> Iterator[str]:
    """Describe the median wall times of runs that were alone on the machine."""
    if results.timings:
        times = [f"{name} {statistics.median(seconds):.0f} s" for name, seconds in results.timings.items()]
        yield f"Wall time of {comparison.lengths[0]} steps, alone on the machine: {', '.join(times)}."


def draw_comparison(comparison: Comparison, results: Results, path: Path) -> None:
    """Plot FVU against latents that never fire, one panel per run length; needs matplotlib (extra `bench`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(comparison.lengths), figsize=(11, 4.5), squeeze=False)
    markers = dict(zip((tool.name for tool in TOOLS), "osD^vP", strict=True))
    for panel, steps in zip(panels[0], comparison.lengths, strict=True):
        for row in comparison_rows(comparison, results):
            if row.steps != steps or any("error" in result for result in row.seeds):
                continue
            shares = [100 * result["never_fired"] for result in row.seeds]
            own, default = row.name == SAETRAIN, row.rate.endswith("default")
            color = f"C{list(markers).index(row.name)}"
            panel.scatter(
                shares,
                [result["fvu"] for result in row.seeds],
                marker=markers[row.name],
                label=f"{row.name}, {row.rate.replace('`', '')}",
                facecolors="none" if default and not own else color,
                edgecolors=color,
            )
        panel.set(title=f"{steps} steps", xlabel="latents that never fire (%)", ylabel="held-out FVU")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)

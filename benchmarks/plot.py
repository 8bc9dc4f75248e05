"""A results file -> one picture of tokens per second: ``python -m benchmarks.plot FILE``; needs the extra ``bench``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.summary import Row, rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

PLOTTED = ("step", "end_to_end", "layers")
COLUMNS = 2
OURS, PEER, FLOOR = "#1f6fb4", "#b8b8b8", "#ffffff"


def colour(row: Row) -> str:
    """Ours, a peer's, or a floor's."""
    if row.tool["name"].startswith("floor"):
        return FLOOR
    return PEER if row.tool["peer"] else OURS


def panel(axes: Axes, case: dict[str, Any]) -> None:
    """One case: a bar per tool, with the quartiles."""
    shown = [row for row in rows(case) if row.spread is not None]
    for place, row in enumerate(shown):
        assert row.spread is not None
        low, high = row.tokens / row.spread.high, row.tokens / row.spread.low
        axes.barh(place, row.rate, color=colour(row), edgecolor="black", linewidth=0.6)
        axes.plot([low, high], [place, place], color="black", linewidth=1.2)
        axes.annotate(f"{row.rate:,.0f}", (max(row.rate, high), place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(shown)), [row.tool["name"] for row in shown])
    axes.invert_yaxis()
    axes.set_title(case["name"], loc="left", fontsize=11)
    axes.margins(x=0.16)
    axes.spines[["top", "right"]].set_visible(False)


def plot(results: dict[str, Any], out: Path) -> None:
    """Draw all cases that set tools side by side."""
    cases = [case for case in results["cases"] if case["group"] in PLOTTED]
    lines = -(-len(cases) // COLUMNS)
    figure, grid = plt.subplots(lines, COLUMNS, figsize=(7.5 * COLUMNS, 3.1 * lines), squeeze=False)
    for axes, case in zip(grid.flat, cases, strict=False):
        panel(axes, case)
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    machine, run = results["machine"], results["run"]
    figure.suptitle(
        f"Tokens per second, median and quartiles (more is better): {machine['cpu']}, {machine['usable_cores']} cores, "
        f"{run['date'][:10]}, commit {run['commit']}",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(out, dpi=110)


def main() -> None:
    """Write the picture beside the results file, or where ``--out`` says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="picture (default: FILE with the ending .png)")
    options = parser.parse_args()
    plot(json.loads(options.file.read_text()), options.out or options.file.with_suffix(".png"))


if __name__ == "__main__":
    main()

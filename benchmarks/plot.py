"""A plot of tokens per second from a results file; needs the extra ``bench``.

python -m benchmarks.plot FILE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.summary import Row, read_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

PLOTTED_GROUPS = ("step", "end_to_end", "layers")
COLUMNS = 2
SAETRAIN, PEER, FLOOR = "#1f6fb4", "#b8b8b8", "#ffffff"


def choose_color(row: Row) -> str:
    """Color of saetrain, of a peer, or of a floor."""
    if row.tool["name"].startswith("floor"):
        return FLOOR
    return PEER if row.tool["peer"] else SAETRAIN


def draw_case(axes: Axes, case: dict[str, Any]) -> None:
    """Draw one bar per tool, with its quartiles."""
    rows = [row for row in read_rows(case) if row.seconds_per_step is not None]
    for y, row in enumerate(rows):
        assert row.seconds_per_step is not None
        low, high = row.tokens / row.seconds_per_step.high, row.tokens / row.seconds_per_step.low
        speed = row.tokens_per_second
        axes.barh(y, speed, color=choose_color(row), edgecolor="black", linewidth=0.6)
        axes.plot([low, high], [y, y], color="black", linewidth=1.2)
        axes.annotate(f"{speed:,.0f}", (max(speed, high), y), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [row.tool["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_title(case["name"], loc="left", fontsize=11)
    axes.margins(x=0.16)
    axes.spines[["top", "right"]].set_visible(False)


def draw_results(results: dict[str, Any], out: Path) -> None:
    """Draw all cases that compare tools."""
    cases = [case for case in results["cases"] if case["group"] in PLOTTED_GROUPS]
    lines = -(-len(cases) // COLUMNS)
    figure, grid = plt.subplots(lines, COLUMNS, figsize=(7.5 * COLUMNS, 3.1 * lines), squeeze=False)
    for axes, case in zip(grid.flat, cases, strict=False):
        draw_case(axes, case)
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
    """Write the plot next to the results file, or to ``--out``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, help="image file (default: FILE with the ending .png)")
    options = parser.parse_args()
    draw_results(json.loads(options.file.read_text()), options.out or options.file.with_suffix(".png"))


if __name__ == "__main__":
    main()

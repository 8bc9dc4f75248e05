"""Tables in Markdown from a results file.

python -m benchmarks.report FILE [--docs benchmarks/performance.md]
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from benchmarks.cases import AUTOCAST
from benchmarks.goals import goals_table
from benchmarks.summary import Record, Row, find_fastest_peer, find_row, read_rows

BEGIN, END = "<!-- measurements: begin -->", "<!-- measurements: end -->"


def find_baselines(rows: list[Row]) -> dict[str, Row]:
    """{heading of a column: the row with which the column compares}."""
    baselines: dict[str, Row] = {}
    fastest, fp32 = find_fastest_peer(rows), find_fastest_peer(rows, model_dtype="fp32")
    autocast = find_row(rows, AUTOCAST)
    if fastest is not None:
        baselines[f"speed over fastest peer ({fastest.tool['name']})"] = fastest
    if fp32 is not None and fp32 is not fastest:
        baselines[f"speed over fastest peer with an fp32 model ({fp32.tool['name']})"] = fp32
    if autocast is not None and autocast is not fastest:
        baselines[f"speed over {AUTOCAST}"] = autocast
    for dtype in ("bf16", "fp32"):
        floor = find_row(rows, f"floor, {dtype} model")
        if floor is not None:
            baselines[f"speed over the {floor.tool['name']}"] = floor
    if not baselines and rows[0].rounds:
        baselines[f"speed over {rows[0].tool['name']}"] = rows[0]
    return baselines


def format_milliseconds(row: Row) -> str:
    """Quartiles of the milliseconds per step, or why there are none."""
    error: str = row.tool.get("error", "no quiet sample")
    return row.seconds_per_step.format(1, 1e3) if row.seconds_per_step else error.replace("|", "/")


def format_peak(row: Row) -> str:
    """Peak memory in MB."""
    return "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"


def case_table(case: Record) -> str:
    """The table of one case."""
    rows = read_rows(case)
    baselines = find_baselines(rows)
    heads = ["tool", "tokens/s", "ms per step", "samples (dropped)", *baselines, "peak MB over imports"]
    lines = [f"### {case['name']}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row.tool["name"], f"{row.tokens_per_second:,.0f}", format_milliseconds(row), row.sample_counts]
        if row.seconds_per_step is None:
            cells[1] = "-"
            cells += ["-" for _ in range(len(baselines) + 1)]
        else:
            cells += [ratio.format(2) if (ratio := row.speed_over(each)) else "-" for each in baselines.values()]
            cells.append(format_peak(row))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def floors_table(cases: list[Record]) -> str:
    """One line per part of the lower bound."""
    lines = ["### floors", "", "| part | ms | samples (dropped) |", "|---|---|---|"]
    for case in cases:
        for row in read_rows(case):
            name = case["name"].removeprefix("floor: ")
            lines.append(f"| {name} | {format_milliseconds(row)} | {row.sample_counts} |")
    return "\n".join([*lines, ""])


def scaling_table(cases: list[Record]) -> str:
    """One line per size and tool."""
    heads = ["F", "k", "N", "tool", "ms per step", "tokens/s", "samples (dropped)", "peak MB over imports"]
    lines = ["### scaling", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case in cases:
        sizes = [str(case["work"][name]) for name in ("latents", "k", "tokens")]
        for row in read_rows(case):
            cells = [row.tool["name"], format_milliseconds(row), f"{row.tokens_per_second:,.0f}", row.sample_counts]
            lines.append("| " + " | ".join([*sizes, *cells, format_peak(row)]) + " |")
    return "\n".join([*lines, ""])


def memory_table(case: Record) -> str:
    """Peak memory of each tool after increasing numbers of tokens."""
    lines = [f"### {case['name']}", "", "| tool | tokens trained: peak MB over imports |", "|---|---|"]
    for tool in case["tools"]:
        cells = [f"{tokens:,}: {peak / 1e6:,.0f}" for tokens, peak in tool["memory"]]
        lines.append(f"| {tool['name']} | {', '.join(cells) or tool.get('error', '-')} |")
    return "\n".join([*lines, ""])


def describe_results(results: Record) -> str:
    """Machine, versions and command of the measurements."""
    machine, run = results["machine"], results["run"]
    versions = ", ".join(f"{name} {'/'.join(found)}" for name, found in sorted(results["versions"].items()))
    family = "/".join(machine["family_model_stepping"])
    return "\n".join(
        [
            f"Machine: {machine['cpu']} (family/model/stepping {family}), {machine['usable_cores']} cores, "
            f"{machine['memory_gib']} GiB, {machine['system']}{', virtual' if machine['hypervisor'] else ''}; "
            f"{', '.join(machine['flags']) or 'none of the vector extensions that matter here'}.",
            "",
            f"Versions: {versions}.",
            "",
            f"Run: `{run['command']}` on {run['date']}, commit {run['commit']}, {run['minutes']} minutes.",
            "",
        ]
    )


def format_report(results: Record) -> str:
    """All tables."""
    parts = [describe_results(results), goals_table(results)]
    for group, members in itertools.groupby(results["cases"], key=lambda case: case["group"]):
        cases = list(members)
        if group == "floors":
            parts.append(floors_table(cases))
        elif group == "scaling":
            parts.append(scaling_table(cases))
        else:
            parts += [memory_table(case) if group == "memory" else case_table(case) for case in cases]
    return "\n".join(parts)


def fill_page(page: Path, text: str) -> None:
    """Put the tables between the page's marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{page} does not contain the marks {BEGIN} and {END}"
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def main() -> None:
    """Print the tables of a results file, or put them into a page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--docs", type=Path, help="page whose marked section is replaced")
    options = parser.parse_args()
    text = format_report(json.loads(options.file.read_text()))
    if options.docs is None:
        print(text)
    else:
        fill_page(options.docs, text)


if __name__ == "__main__":
    main()

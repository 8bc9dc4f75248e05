"""A results file -> tables in Markdown: ``python -m benchmarks.report FILE [--docs docs/performance.md]``."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from benchmarks import goals
from benchmarks.cases import AUTOCAST
from benchmarks.summary import Record, Row, named, rival, rows

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def baselines(found: list[Row]) -> dict[str, Row]:
    """{column: what the rows are compared with}."""
    out: dict[str, Row] = {}
    fastest, fp32, autocast = rival(found), rival(found, model_dtype="fp32"), named(found, AUTOCAST)
    if fastest is not None:
        out[f"over fastest peer ({fastest.tool['name']})"] = fastest
    if fp32 is not None and fp32 is not fastest:
        out[f"over fastest peer with an fp32 model ({fp32.tool['name']})"] = fp32
    if autocast is not None and autocast is not fastest:
        out[f"over {AUTOCAST}"] = autocast
    for dtype in ("bf16", "fp32"):
        floor = named(found, f"floor, {dtype} model")
        if floor is not None:
            out[f"share of the speed of the {floor.tool['name']}"] = floor
    if not out and found[0].rounds:
        out[f"over {found[0].tool['name']}"] = found[0]
    return out


def case_table(case: Record) -> str:
    """The table of one case."""
    found = rows(case)
    against = baselines(found)
    heads = ["tool", "tokens/s", "ms per step", "samples (dropped)", *against, "peak MB over imports"]
    lines = [f"### {case['name']}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in found:
        if row.spread is None:
            why = row.tool.get("error", "no quiet sample")
            cells = [row.tool["name"], "-", why.replace("|", "/"), row.counts, *("-" for _ in against), "-"]
        else:
            ratios = [ratio.show(2) if (ratio := row.over(other)) else "-" for other in against.values()]
            peak = "-" if row.peak is None else f"{row.peak / 1e6:,.0f}"
            time = row.spread.show(1, 1e3)
            cells = [row.tool["name"], f"{row.rate:,.0f}", time, row.counts, *ratios, peak]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def floors_table(cases: list[Record]) -> str:
    """One line per floor."""
    lines = ["### floors", "", "| what | ms | samples (dropped) |", "|---|---|---|"]
    for case in cases:
        for row in rows(case):
            time = row.spread.show(1, 1e3) if row.spread else row.tool.get("error", "no quiet sample")
            lines.append(f"| {case['name'].removeprefix('floor: ')} | {time} | {row.counts} |")
    return "\n".join([*lines, ""])


def scaling_table(cases: list[Record]) -> str:
    """One line per size and tool."""
    heads = ["F", "k", "N", "tool", "ms per step", "tokens/s", "samples (dropped)", "peak MB over imports"]
    lines = ["### scaling", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case in cases:
        work = case["work"]
        for row in rows(case):
            time = row.spread.show(1, 1e3) if row.spread else row.tool.get("error", "no quiet sample")
            peak = "-" if row.peak is None else f"{row.peak / 1e6:,.0f}"
            cells = [row.tool["name"], time, f"{row.rate:,.0f}", row.counts, peak]
            lines.append(f"| {work['latents']} | {work['k']} | {work['tokens']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def memory_table(case: Record) -> str:
    """Peak memory of each tool after so many tokens."""
    lines = [f"### {case['name']}", "", "| tool | tokens trained: peak MB over imports |", "|---|---|"]
    for tool in case["tools"]:
        trained, cells = len(tool.get("warmup_seconds", ())) * case["work"]["tokens"], []
        for sample in tool["samples"]:
            trained += len(sample["seconds"]) * case["work"]["tokens"]
            cells.append(f"{trained:,}: {sample['peak_bytes'] / 1e6:,.0f}")
        lines.append(f"| {tool['name']} | {', '.join(cells) or tool.get('error', '-')} |")
    return "\n".join([*lines, ""])


def heading(results: Record) -> str:
    """Where the figures come from."""
    machine, run = results["machine"], results["run"]
    versions: dict[str, set[str]] = {}
    for case in results["cases"]:
        for tool in case["tools"]:
            for name, version in tool.get("versions", {}).items():
                versions.setdefault(name, set()).add(version)
    shown = ", ".join(f"{name} {'/'.join(sorted(found))}" for name, found in sorted(versions.items()))
    family = "/".join(machine["family_model_stepping"])
    return "\n".join(
        [
            f"Machine: {machine['cpu']} (family/model/stepping {family}), {machine['usable_cores']} cores, "
            f"{machine['memory_gib']} GiB, {machine['system']}{', virtual' if machine['hypervisor'] else ''}; "
            f"{', '.join(machine['flags']) or 'no vector extensions of note'}.",
            "",
            f"Versions: {shown}.",
            "",
            f"Run: `{run['command']}` on {run['date']}, commit {run['commit']}, {run['minutes']} minutes.",
            "",
        ]
    )


def report(results: Record) -> str:
    """All tables."""
    parts = [heading(results), goals.table(results)]
    for group, members in itertools.groupby(results["cases"], key=lambda case: case["group"]):
        cases = list(members)
        if group == "floors":
            parts.append(floors_table(cases))
        elif group == "scaling":
            parts.append(scaling_table(cases))
        else:
            parts += [memory_table(case) if group == "memory" else case_table(case) for case in cases]
    return "\n".join(parts)


def fill(page: Path, text: str) -> None:
    """Put the tables between the page's marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{page}: the marks {BEGIN} and {END} are not there"
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def main() -> None:
    """Print the tables of a results file, or put them into a page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--docs", type=Path, help="page whose marked section is filled")
    options = parser.parse_args()
    text = report(json.loads(options.file.read_text()))
    if options.docs is None:
        print(text)
    else:
        fill(options.docs, text)


if __name__ == "__main__":
    main()

"""A results file -> tables in Markdown: ``python -m benchmarks.report FILE [--docs docs/performance.md]``."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
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


def rival(found: list[Row], model_dtype: str | None = None) -> Row | None:
    """The fastest peer, over a model of that dtype where one is given."""
    peers = [
        row
        for row in found
        if row.tool["peer"]
        and row.rounds
        and (model_dtype is None or row.tool["changes"].get("model_dtype") == model_dtype)
    ]
    return max(peers, key=lambda row: row.rate, default=None)


def baselines(case: Record, found: list[Row]) -> dict[str, Row]:
    """{column: what the rows are compared with}."""
    out = {}
    fastest, fp32 = rival(found), rival(found, "fp32")
    floors = [row for row in found if row.tool["name"].startswith("floor") and row.rounds]
    if fastest is not None:
        out[f"over fastest peer ({fastest.tool['name']})"] = fastest
    if fp32 is not None and fp32 is not fastest:
        out[f"over fastest peer with an fp32 model ({fp32.tool['name']})"] = fp32
    for row in floors:
        out[f"share of the {row.tool['name']}"] = row
    if not out and found[0].rounds:
        out[f"over {found[0].tool['name']}"] = found[0]
    return out


def case_table(case: Record) -> str:
    """The table of one case."""
    found = rows(case)
    against = baselines(case, found)
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


def flat_table(group: str, cases: list[Record]) -> str:
    """One table for a group of many small cases: a line per case and tool."""
    heads = ["what", "tool", "ms", "tokens/s", "samples (dropped)", "peak MB over imports"]
    lines = [f"### {group}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case in cases:
        name = case["name"].removeprefix("floor: ").removeprefix("scaling ")
        for row in rows(case):
            time = row.spread.show(1, 1e3) if row.spread else row.tool.get("error", "no quiet sample")
            peak = "-" if row.peak is None else f"{row.peak / 1e6:,.0f}"
            lines.append(f"| {name} | {row.tool['name']} | {time} | {row.rate:,.0f} | {row.counts} | {peak} |")
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
    parts = [heading(results)]
    for group, members in itertools.groupby(results["cases"], key=lambda case: case["group"]):
        cases = list(members)
        if group in ("floors", "scaling"):
            parts.append(flat_table(group, cases))
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

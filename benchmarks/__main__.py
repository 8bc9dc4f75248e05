"""Time training steps, and write a results file and its tables; benchmarks/performance.md explains the method."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import GROUPS, KERNELS, Case, Tool
from benchmarks.machine import ROOT, describe_machine, describe_run
from benchmarks.measure import MeasurePlan, measure_cases
from benchmarks.report import format_report
from benchmarks.results_file import write_results

OWN_GROUPS = ("step", "precision", "dead", "end_to_end", "floors")
"""Groups of ``make bench``, which is run before and after a change."""
QUICK: dict[str, Any] = {"tokens": 128, "width": 32, "k": 4, "blocks": 2, "heads": 2, "ctx_len": 32}
"""Sizes of --quick, whose times mean nothing."""


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--peers", action="store_true", help="time other tools too (make bench-peers installs them)")
    parser.add_argument("--cases", nargs="+", choices=list(GROUPS), help="groups of cases")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name contains one of these")
    parser.add_argument("--tools", nargs="+", default=[], metavar="TEXT", help="tools whose name contains one of these")
    parser.add_argument(
        "--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS), help="kernels of saetrain"
    )
    parser.add_argument("--rounds", type=int, help="samples of each tool in a case (default 5 with peers, else 3)")
    parser.add_argument("--seconds", type=float, help="target length of a sample (default 1 with peers, else 0.5)")
    parser.add_argument("--threads", type=int, default=MeasurePlan.threads, help="threads of each tool")
    parser.add_argument(
        "--max_other_cpu",
        type=float,
        default=MeasurePlan.max_other_cpu,
        help="drop a sample if other processes use more than this share of the CPU",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/DATE.json)")
    return parser.parse_args(arguments)


def select_cases(options: argparse.Namespace) -> list[Case]:
    """The cases that the options name."""
    groups = options.cases or (list(GROUPS) if options.peers else OWN_GROUPS)
    cases = [case for group in groups for case in GROUPS[group](options.kernels, options.peers)]
    if options.only:
        cases = [case for case in cases if any(text in case.name for text in options.only)]
    if options.tools:
        cases = [dataclasses.replace(case, tools=tuple(select_tools(case, options.tools))) for case in cases]
        cases = [case for case in cases if case.tools]
    return [shrink_case(case) for case in cases] if options.quick else cases


def select_tools(case: Case, texts: list[str]) -> list[Tool]:
    """The case's tools whose name contains one of the texts."""
    return [tool for tool in case.tools if any(text in tool.name for text in texts)]


def shrink_case(case: Case) -> Case:
    """The case with tiny sizes."""
    layers = (0, 1) if len(case.work.layers) > 1 else (0,)
    work = dataclasses.replace(case.work, **QUICK, latents=max(64, case.work.latents // 96), layers=layers)
    return dataclasses.replace(case, work=work, repeats=tuple(1 for _ in case.repeats))


def log_progress(text: str) -> None:
    """Print to stderr, because stdout is for the tables."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, write the results file and print its tables."""
    options = parse_options(sys.argv[1:])
    rounds, seconds = (5, 1.0) if options.peers else (3, 0.5)
    plan = MeasurePlan(
        rounds=options.rounds or rounds,
        seconds=0.02 if options.quick else options.seconds or seconds,
        max_other_cpu=options.max_other_cpu,
        threads=options.threads,
    )
    run, versions = describe_run(sys.argv[1:]), dict[str, set[str]]()
    out = options.out or ROOT / "benchmarks" / "results" / f"{run['date'][:16].replace(':', '')}.json"
    start = time.monotonic()
    results: dict[str, Any] = {"run": run, "plan": dataclasses.asdict(plan), "machine": describe_machine()}
    results |= {"versions": {}, "cases": []}
    for record in measure_cases(select_cases(options), plan, versions, log_progress):
        results["cases"].append(record)
        results["versions"] = {name: sorted(found) for name, found in versions.items()}
        run["minutes"] = round((time.monotonic() - start) / 60, 1)
        # Written after each case, so that an interrupted run keeps what it has measured.
        write_results(out, results)
    print(format_report(json.loads(out.read_text())))
    print(f"wrote {out}", file=sys.stderr)


if __name__ == "__main__":
    main()

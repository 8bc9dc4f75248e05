"""Command line of the benchmark: choose cases, conduct them, write a results file and its tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import GROUPS, PATHS, Case, Tool
from benchmarks.machine import ROOT, describe_machine, describe_run
from benchmarks.measure import Plan, conduct
from benchmarks.report import report

OWN_GROUPS = ("step", "precision", "dead", "end_to_end", "floors")
"""What ``make bench`` runs: what one looks at before and after a change."""
QUICK: dict[str, Any] = {"tokens": 128, "width": 32, "k": 4, "blocks": 2, "heads": 2, "ctx_len": 32}
"""Sizes of --quick, which shows that everything runs and times nothing of interest."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--peers", action="store_true", help="time the peers too (make bench-peers installs them)")
    parser.add_argument("--cases", nargs="+", choices=list(GROUPS), help="groups of cases")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name contains one of these")
    parser.add_argument("--tools", nargs="+", default=[], metavar="TEXT", help="tools whose name contains one of these")
    parser.add_argument("--paths", nargs="+", choices=list(PATHS), default=list(PATHS), help="our paths")
    parser.add_argument("--rounds", type=int, help="samples of each tool in a case (default 5 with peers, else 3)")
    parser.add_argument("--seconds", type=float, help="aimed length of a sample (default 1 with peers, else 0.5)")
    parser.add_argument("--threads", type=int, default=Plan.threads, help="threads of each tool")
    parser.add_argument(
        "--others_limit",
        type=float,
        default=Plan.others_limit,
        help="share of the CPU used by others above which a sample is dropped",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/DATE.json)")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for."""
    groups = options.cases or (list(GROUPS) if options.peers else OWN_GROUPS)
    cases = [case for group in groups for case in GROUPS[group](options.paths, options.peers)]
    if options.only:
        cases = [case for case in cases if any(text in case.name for text in options.only)]
    if options.tools:
        cases = [dataclasses.replace(case, tools=tuple(wanted(case, options.tools))) for case in cases]
        cases = [case for case in cases if case.tools]
    return [shrunk(case) for case in cases] if options.quick else cases


def wanted(case: Case, texts: list[str]) -> list[Tool]:
    """The case's tools whose name contains one of the texts."""
    return [tool for tool in case.tools if any(text in tool.name for text in texts)]


def shrunk(case: Case) -> Case:
    """The case in tiny sizes."""
    layers = (0, 1) if len(case.work.layers) > 1 else (0,)
    work = dataclasses.replace(case.work, **QUICK, latents=max(64, case.work.latents // 96), layers=layers)
    return dataclasses.replace(case, work=work, repeats=tuple(1 for _ in case.repeats))


def main() -> None:
    """Run and write."""
    options = parse(sys.argv[1:])
    rounds, seconds = (5, 1.0) if options.peers else (3, 0.5)
    plan = Plan(
        rounds=options.rounds or rounds,
        seconds=0.02 if options.quick else options.seconds or seconds,
        others_limit=options.others_limit,
        threads=options.threads,
    )
    run = describe_run(sys.argv[1:])
    out = options.out or ROOT / "benchmarks" / "results" / f"{run['date'][:16].replace(':', '')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    results: dict[str, Any] = {"run": run, "plan": dataclasses.asdict(plan), "machine": describe_machine(), "cases": []}
    for record in conduct(chosen(options), plan, lambda text: print(text, file=sys.stderr, flush=True)):
        results["cases"].append(record)
        run["minutes"] = round((time.monotonic() - start) / 60, 1)
        # A run of half an hour that is cut off should leave what it has measured.
        out.write_text(json.dumps(results, indent=1) + "\n")
    print(report(results))
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()

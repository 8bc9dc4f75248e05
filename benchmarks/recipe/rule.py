"""How close `--lr auto` comes to the best fixed rate, over widths, sparsities, run lengths and sites.

    python -m benchmarks.recipe.rule

For each case a sweep by factors of two, until the best rate's neighbours are known, and the rule's own rate.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.recipe.activations import HELD_OUT_TOKENS, SITES, TRAIN_TOKENS, cache_activations
from benchmarks.recipe.results import Results
from benchmarks.recipe.sweep import FACTOR, SAETRAIN, best_rate, is_settled, next_rates
from benchmarks.recipe.task import Task
from benchmarks.recipe.task_runner import add_run_options, run_tasks
from saetrain.coders import CODERS, DEFAULT_ARCHITECTURE
from saetrain.optim import RunSize, recommended_lr

OUT = ROOT / "benchmarks" / "results" / "recipe-rule.json"
TOLERANCE = 0.004
"""Largest accepted FVU above that of the best fixed rate."""
BATCH_CASE: dict[str, Any] = {"latents": 3072, "k": 32, "steps": 400}
"""The cases with other batch sizes."""
ANCHOR = 0.01
"""All rates of a sweep are ANCHOR times a power of FACTOR, so that they stay the same when the rule changes."""


def rule_tasks(options: argparse.Namespace) -> list[Task]:
    """One task with the rule's rate per case, short and narrow cases first."""
    grid = [
        Task(SAETRAIN, site, latents, k, steps, options.tokens, options.seed, architecture=options.architecture)
        for steps in sorted(options.steps)
        for latents in sorted(options.latents)
        for site in options.sites
        for k in options.k
    ]
    batches = [replace(grid[0], site=options.sites[0], tokens=tokens, **BATCH_CASE) for tokens in options.batches]
    return [*grid, *batches]


def rule_rate(task: Task) -> float:
    """The rate that the rule chooses for a task."""
    factor = CODERS[task.architecture].lr_scale
    assert factor is not None, f"no rule for {task.architecture}"
    return factor * recommended_lr(RunSize(task.latents, task.k, task.tokens, task.steps))


def first_sweep_rate(task: Task) -> float:
    """The rate of the sweep that is closest to the rule's."""
    rate = ANCHOR
    while rate > rule_rate(task) * FACTOR**0.5:
        rate /= FACTOR
    while rate < rule_rate(task) / FACTOR**0.5:
        rate *= FACTOR
    return rate


def missing_tasks(tasks: Iterable[Task], results: Results, sweep_alone: bool) -> list[Task]:
    """Tasks of these cases that have no result yet."""
    found: list[Task] = []
    for task in tasks:
        rates = next_rates(results.tried_rates(task), first_sweep_rate(task))
        found += [replace(task, lr=rate) for rate in rates]
        if not sweep_alone and not rates:
            found.append(task)
    return [task for task in found if results.get(task) is None]


def discard_stale(tasks: Iterable[Task], results: Results) -> None:
    """Discard runs of the rule for which it now chooses another rate."""
    old = []
    for task in tasks:
        result = results.get(task)
        if result and abs(result["lr"] / rule_rate(task) - 1) > 1e-6:
            old.append(task)
    results.discard(old)


def rule_table(tasks: Iterable[Task], results: Results) -> str:
    """One row per complete case, and the number of cases within the tolerance."""
    rows = ["| site | F | k | N | steps | best fixed lr | FVU | never fired | rule | FVU | above | never fired |"]
    rows.append("|---" * 12 + "|")
    above: list[float] = []
    for task in tasks:
        tried, own = results.tried_rates(task), results.get(task)
        if own is None or not is_settled(tried):
            continue
        best = results.get(replace(task, lr=best_rate(tried)))
        assert best is not None
        above.append(own["fvu"] - best["fvu"])
        rows.append(
            f"| {task.site} | {task.latents} | {task.k} | {task.tokens} | {task.steps} | {best['lr']:.2g} | "
            f"{best['fvu']:.4f} | {best['never_fired']:.1%} | {own['lr']:.2g} | {own['fvu']:.4f} | {above[-1]:+.4f} | "
            f"{own['never_fired']:.1%} |"
        )
    within = sum(gap <= TOLERANCE for gap in above)
    median = f", median {statistics.median(above):+.4f}, worst {max(above):+.4f}" if above else ""
    return "\n".join([*rows, "", f"Within {TOLERANCE} of the best fixed rate: {within} of {len(above)}{median}."])


def build_parser() -> argparse.ArgumentParser:
    """Build the command line's parser."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.recipe.rule",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--architecture", choices=list(CODERS), default=DEFAULT_ARCHITECTURE)
    found.add_argument("--sites", nargs="+", choices=list(SITES), default=list(SITES))
    found.add_argument("--latents", nargs="+", type=int, default=[512, 3072, 12288])
    found.add_argument("--k", nargs="+", type=int, default=[16, 32, 64])
    found.add_argument("--steps", nargs="+", type=int, default=[400, 4000])
    found.add_argument("--tokens", type=int, default=1024, help="activations per step")
    found.add_argument(
        "--batches", nargs="*", type=int, default=[256, 4096], help="other numbers of activations per step"
    )
    found.add_argument("--seed", type=int, default=1)
    found.add_argument("--sweep_alone", action="store_true", help="skip the rule's own runs")
    found.add_argument("--train_tokens", type=int, default=TRAIN_TOKENS, help="size of the training text")
    found.add_argument("--held_out_tokens", type=int, default=HELD_OUT_TOKENS, help="size of the held-out text")
    add_run_options(found, OUT)
    return found


def available_sites(sites: Iterable[str]) -> list[str]:
    """The sites whose model exists; prints the names of the others."""
    found = []
    for site in sites:
        if SITES[site].model().exists():
            found.append(site)
        else:
            print(f"skipping {site}: {SITES[site].model()} does not exist")
    return found


def main() -> None:
    """Run the missing tasks and print the table."""
    options = build_parser().parse_args()
    options.sites = available_sites(options.sites)
    results, tasks = Results(options.out, "benchmarks.recipe.rule", sys.argv[1:]), rule_tasks(options)
    discard_stale(tasks, results)
    results.discard_if_again([task for task, _ in results.runs if replace(task, lr=None) in tasks], options.again)
    activations = functools.partial(
        cache_activations, folder=options.folder, train=options.train_tokens, held_out=options.held_out_tokens
    )
    run_tasks(
        lambda: missing_tasks(tasks, results, options.sweep_alone),
        results,
        activations,
        processes=options.processes,
        threads=options.threads,
    )
    print(rule_table(tasks, results))


if __name__ == "__main__":
    main()

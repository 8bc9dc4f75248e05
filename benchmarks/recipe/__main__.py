"""SAEs of saetrain with `--lr auto` next to those of other tools, at their defaults and at the best rate of a sweep.

    python -m benchmarks.recipe

The text is Python's own documentation. The activations of all-MiniLM-L6-v2 are extracted once, and every tool trains on
the same batches, each in its own environment (`make bench-recipe` installs them). A comparison that was interrupted
continues where it stopped. benchmarks/recipe.md shows the results.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.recipe.activations import HELD_OUT_TOKENS, SITES, TRAIN_TOKENS, cache_activations
from benchmarks.recipe.report import comparison_table, draw_comparison
from benchmarks.recipe.results import Results
from benchmarks.recipe.sweep import TOOLS, Comparison, Tool
from benchmarks.recipe.task import Task
from benchmarks.recipe.task_runner import add_run_options, run_task, run_tasks
from saetrain.coders import CODERS, DEFAULT_ARCHITECTURE

OUT = ROOT / "benchmarks" / "results" / "recipe.json"
ROUNDS = 3


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", choices=list(CODERS), default=DEFAULT_ARCHITECTURE)
    parser.add_argument("--site", choices=list(SITES), default="minilm-3", help="model and layer of the activations")
    parser.add_argument("--latents", type=int, default=3072)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024, help="activations per step")
    parser.add_argument("--steps", type=int, nargs="+", default=[400, 4000], help="lengths of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tools", nargs="+", choices=[tool.name for tool in TOOLS], help="run only these tools")
    parser.add_argument("--time", action="store_true", help="time the shortest runs, one at a time on all cores")
    parser.add_argument("--plot", type=Path, help="also draw a plot (needs the extra bench)")
    parser.add_argument("--train_tokens", type=int, default=TRAIN_TOKENS, help="size of the training text")
    parser.add_argument("--held_out_tokens", type=int, default=HELD_OUT_TOKENS, help="size of the held-out text")
    add_run_options(parser, OUT)
    return parser.parse_args()


def time_tools(comparison: Comparison, tools: tuple[Tool, ...], results: Results, activations: Path) -> None:
    """Measure the wall time of the shortest runs, with the tools in turn."""
    steps, threads = comparison.lengths[0], os.cpu_count() or 1
    results.timings = {}
    for _ in range(ROUNDS):
        for tool in tools:
            best = comparison.best_tasks(tool, steps, results) if tool.first_lr is not None else None
            found = run_task((best or comparison.default_tasks(tool, steps))[0], activations, threads)
            results.timings.setdefault(tool.name, []).append(found["seconds"])
    results.write()


def main() -> None:
    """Run the missing tasks and print the table."""
    options = parse_options()
    make = functools.partial(
        Task,
        site=options.site,
        latents=options.latents,
        k=options.k,
        tokens=options.tokens,
        architecture=options.architecture,
    )
    comparison = Comparison(make, tuple(sorted(options.steps)), tuple(options.seeds))
    tools = tuple(
        tool
        for tool in TOOLS
        if options.architecture in tool.architectures and (not options.tools or tool.name in options.tools)
    )
    results = Results(options.out, "benchmarks.recipe", sys.argv[1:])
    activations = functools.partial(
        cache_activations, folder=options.folder, train=options.train_tokens, held_out=options.held_out_tokens
    )
    results.discard_if_again(
        [task for task, _ in results.runs if task.tool in {tool.name for tool in tools}], options.again
    )
    run_tasks(
        lambda: comparison.missing_tasks(tools, results),
        results,
        activations,
        processes=options.processes,
        threads=options.threads,
    )
    if options.time:
        time_tools(comparison, tools, results, activations(options.site))
    if options.plot:
        draw_comparison(comparison, results, options.plot)
    print(comparison_table(comparison, results))


if __name__ == "__main__":
    main()

"""Ablation of the recipe: the same runs with one component switched off at a time.

    python -m benchmarks.recipe.ablation

Short runs use half, once and twice the rule's rate, and the best of them counts. Long runs use only the rule's rate.
"""

from __future__ import annotations

import argparse
import functools
import sys

from benchmarks.machine import ROOT
from benchmarks.recipe.activations import HELD_OUT_TOKENS, TRAIN_TOKENS, cache_activations
from benchmarks.recipe.components import COMPONENTS
from benchmarks.recipe.results import Result, Results
from benchmarks.recipe.sweep import SAETRAIN
from benchmarks.recipe.task import Task
from benchmarks.recipe.task_runner import add_run_options, run_tasks
from saetrain.optim import RunSize, recommended_lr

OUT = ROOT / "benchmarks" / "results" / "recipe-ablation.json"
SITE, LATENTS, K, TOKENS, SEED = "minilm-3", 3072, 32, 1024, 1
FACTORS = {400: (0.5, 1.0, 2.0), 4000: (1.0,)}
"""{steps: rates tried, as multiples of the rule's rate}"""


def ablation_tasks(component: str | None, steps: int) -> list[Task]:
    """The runs without ``component``, one per rate; None: the complete recipe."""
    rule = recommended_lr(RunSize(LATENTS, K, TOKENS, steps))
    options = {"without": component} if component else {}
    rates = [float(f"{factor * rule:.6g}") for factor in FACTORS[steps]]
    return [Task(SAETRAIN, SITE, LATENTS, K, steps, TOKENS, SEED, lr, options=options) for lr in rates]


def best_result(component: str | None, steps: int, results: Results) -> Result | None:
    """The result at the best rate, or None until all runs are done."""
    found = [results.get(task) for task in ablation_tasks(component, steps)]
    done = [result for result in found if result is not None]
    return min(done, key=lambda result: result["fvu"]) if len(done) == len(found) else None


def ablation_table(results: Results) -> str:
    """One row per component: FVU and never-fired latents without it, for both lengths."""
    head = ["without", *(f"{what}, {steps} steps" for steps in FACTORS for what in ("best lr", "FVU", "never fired"))]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for component in (None, *COMPONENTS):
        cells = []
        for steps in FACTORS:
            found = best_result(component, steps, results)
            shown = [f"{found['lr']:.2g}", f"{found['fvu']:.4f}", f"{found['never_fired']:.1%}"] if found else [""] * 3
            cells += shown
        rows.append(f"| {component or '(complete recipe)'} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run the missing tasks and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipe.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", nargs="+", type=int, choices=list(FACTORS), default=list(FACTORS))
    add_run_options(parser, OUT)
    options = parser.parse_args()
    results = Results(options.out, "benchmarks.recipe.ablation", sys.argv[1:])
    wanted = [
        task
        for steps in options.steps
        for component in (None, *COMPONENTS)
        for task in ablation_tasks(component, steps)
    ]
    results.discard_if_again(wanted, options.again)
    run_tasks(
        lambda: [task for task in wanted if results.get(task) is None],
        results,
        functools.partial(cache_activations, folder=options.folder, train=TRAIN_TOKENS, held_out=HELD_OUT_TOKENS),
        processes=options.processes,
        threads=options.threads,
    )
    print(ablation_table(results))


if __name__ == "__main__":
    main()

"""The default learning rate, k, expansion factor and batch size, compared with `--lr auto` on the same batches.

python -m benchmarks.recipe.defaults
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys

from benchmarks.machine import ROOT
from benchmarks.recipe.activations import HELD_OUT_TOKENS, SITES, TRAIN_TOKENS, cache_activations
from benchmarks.recipe.results import Results
from benchmarks.recipe.sweep import SAETRAIN
from benchmarks.recipe.task import Task
from benchmarks.recipe.task_runner import add_run_options, run_tasks
from saetrain.coders.topk import TopKSettings
from saetrain.data.tokenize import DEFAULT_CTX_LEN
from saetrain.optim import OptimSettings
from saetrain.training.trainer import TrainSettings

OUT = ROOT / "benchmarks" / "results" / "recipe-defaults.json"
MINILM_WIDTH = 384
"""Width of MiniLM's activations."""


def default_tasks(site: str) -> list[Task]:
    """The default run at the default rate and at the rule's rate."""
    sae, train, lr = TopKSettings(), TrainSettings(), OptimSettings().lr
    assert lr != "auto"
    tokens = train.batch_size * train.grad_acc_steps * DEFAULT_CTX_LEN
    run = Task(SAETRAIN, site, sae.resolve_num_latents(MINILM_WIDTH), sae.k, train.max_tokens // tokens, tokens, seed=1)
    return [dataclasses.replace(run, lr=lr, options={"weight_decay": OptimSettings().effective_weight_decay}), run]


def defaults_table(site: str, results: Results) -> str:
    """One row per rate that has a result."""
    rows = ["| `--lr` | learning rate | FVU | never fired | inactive in the last 50 batches |", "|---" * 5 + "|"]
    for task in default_tasks(site):
        found = results.get(task)
        if found is not None:
            rows.append(
                f"| {'`auto`' if task.lr is None else 'default'} | {found['lr']:.2g} | {found['fvu']:.4f} | "
                f"{found['never_fired']:.1%} | {found['dead_by_window']:.1%} |"
            )
    return "\n".join(rows)


def main() -> None:
    """Run the missing tasks and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipe.defaults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--site", choices=[site for site in SITES if "minilm" in site], default="minilm-3")
    add_run_options(parser, OUT)
    options = parser.parse_args()
    results = Results(options.out, "benchmarks.recipe.defaults", sys.argv[1:])
    results.discard_if_again(default_tasks(options.site), options.again)
    run_tasks(
        lambda: [task for task in default_tasks(options.site) if results.get(task) is None],
        results,
        functools.partial(cache_activations, folder=options.folder, train=TRAIN_TOKENS, held_out=HELD_OUT_TOKENS),
        processes=options.processes,
        threads=options.threads,
    )
    print(defaults_table(options.site, results))


if __name__ == "__main__":
    main()

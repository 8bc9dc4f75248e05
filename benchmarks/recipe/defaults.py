"""What the defaults of rate, k, expansion and batch give, beside `--lr auto` over the same batches.

python -m benchmarks.recipe.defaults
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys

from benchmarks.machine import ROOT
from benchmarks.recipe.activations import HELD_OUT_TOKENS, SITES, TRAIN_TOKENS, cached
from benchmarks.recipe.results import Results
from benchmarks.recipe.sweep import OURS
from benchmarks.recipe.task import Task
from benchmarks.recipe.task_runner import add_options, conduct
from saetrain.coders.topk import TopKSettings
from saetrain.data.tokenize import DEFAULT_CTX_LEN
from saetrain.optim import OptimSettings
from saetrain.training.trainer import TrainSettings

OUT = ROOT / "benchmarks" / "results" / "recipe-defaults.json"
WIDTH = 384
"""Of MiniLM's activations."""


def tasks(site: str) -> list[Task]:
    """The default run at its rate and at the rule's."""
    sae, train, lr = TopKSettings(), TrainSettings(), OptimSettings().lr
    assert lr != "auto"
    tokens = train.batch_size * train.grad_acc_steps * DEFAULT_CTX_LEN
    run = Task(OURS, site, sae.latents(WIDTH), sae.k, train.max_tokens // tokens, tokens, seed=1)
    return [dataclasses.replace(run, lr=lr, options={"weight_decay": OptimSettings().decay}), run]


def table(site: str, results: Results) -> str:
    """A row for each rate that is done."""
    rows = ["| `--lr` | learning rate | FVU | never fired | silent in the last 50 batches |", "|---" * 5 + "|"]
    for task in tasks(site):
        found = results.get(task)
        if found is not None:
            rows.append(
                f"| {'`auto`' if task.lr is None else 'default'} | {found['lr']:.2g} | {found['fvu']:.4f} | "
                f"{found['never_fired']:.1%} | {found['dead_by_window']:.1%} |"
            )
    return "\n".join(rows)


def main() -> None:
    """Run what is lacking, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipe.defaults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--site", choices=[site for site in SITES if "minilm" in site], default="minilm-3")
    add_options(parser, OUT)
    options = parser.parse_args()
    results = Results(options.out, "benchmarks.recipe.defaults", sys.argv[1:])
    results.renew(tasks(options.site), options.again)
    conduct(
        lambda: [task for task in tasks(options.site) if results.get(task) is None],
        results,
        functools.partial(cached, folder=options.folder, train=TRAIN_TOKENS, held_out=HELD_OUT_TOKENS),
        processes=options.processes,
        threads=options.threads,
    )
    print(table(options.site, results))


if __name__ == "__main__":
    main()

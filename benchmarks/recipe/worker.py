"""The process of one task: trains by one tool and scores what came out, by a definition of its own.

python -m benchmarks.recipe.worker ACTIVATIONS THREADS TASK, in the environment of the task's tool; its last line of
output is JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.recipe.task import Batches, Task
from benchmarks.worker import package_versions

Reconstruct = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations (n, D) -> their reconstruction (n, D), and which latents fired (n, F)."""

ROWS = 1024
WINDOW_STEPS = 50
"""Last steps of training on which a latent must fire, by the final weights, not to count as dead by the window."""


@torch.no_grad()
def score_sae(reconstruct: Reconstruct, held_out_TD: Tensor, last_batches: list[Tensor]) -> dict[str, float]:
    """FVU, L0 and shares of latents that fire on nothing of ``held_out_TD`` and of the batches ``last``."""
    error, fired = 0.0, None
    for rows in held_out_TD.split(ROWS):
        rebuilt, active = reconstruct(rows)
        error += float((rebuilt - rows).double().square().sum())
        fired = active.sum(dim=0) if fired is None else fired + active.sum(dim=0)
    recent = torch.stack([reconstruct(rows)[1].any(dim=0) for batch in last_batches for rows in batch.split(ROWS)])
    assert fired is not None
    variance = (held_out_TD - held_out_TD.double().mean(dim=0)).square().sum()
    return {
        "fvu": error / float(variance),
        "never_fired": float((fired == 0).double().mean()),
        "dead_by_window": float((~recent.any(dim=0)).double().mean()),
        "l0": float(fired.sum()) / len(held_out_TD),
    }


def train_and_score(activations: Path, task: Task) -> dict[str, Any]:
    """Train and score."""
    tensors = load_file(activations)
    batches = Batches(tensors["train"], task)
    tool = importlib.import_module(f"benchmarks.recipe.{task.module}")
    start = time.perf_counter()
    reconstruct, chosen = tool.fit_sae(task, batches)
    seconds = time.perf_counter() - start
    last = [batches[step] for step in range(max(0, task.steps - WINDOW_STEPS), task.steps)]
    return {
        **score_sae(reconstruct, tensors["held_out"], last),
        "seconds": seconds,
        **chosen,
        "versions": package_versions(),
    }


def main() -> None:
    """Run the task of the command line."""
    activations, threads, task = sys.argv[1:]
    chosen = Task(**json.loads(task))
    torch.set_num_threads(int(threads))
    torch.set_flush_denormal(True)
    # "medium" makes products of fp32 tensors in bfloat16 where the CPU has them; saetrain chooses by itself.
    torch.set_float32_matmul_precision("highest" if chosen.fp32_products or chosen.tool == "saetrain" else "medium")
    print("\n" + json.dumps(train_and_score(Path(activations), chosen)))


if __name__ == "__main__":
    main()

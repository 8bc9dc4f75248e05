"""The process of one task: trains with one tool, and scores the SAE with code that all tools share.

Usage: python -m benchmarks.recipe.worker ACTIVATIONS THREADS TASK, in the environment of the task's tool. The last line
of its output is JSON.
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
"""Activations (n, D) -> their reconstruction (n, D), and whether each latent fired (n, F)."""

ROWS = 1024
WINDOW_STEPS = 50
"""A latent is dead by the window if, with the final weights, it fires on none of the last steps' batches."""


@torch.no_grad()
def score_sae(reconstruct: Reconstruct, held_out_TD: Tensor, last_batches: list[Tensor]) -> dict[str, float]:
    """FVU, L0, and the shares of latents that never fire on ``held_out_TD`` and on ``last_batches``."""
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
    """Train with the task's tool and score the SAE."""
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
    """Run the task that the command line gives."""
    activations, threads, task = sys.argv[1:]
    chosen = Task(**json.loads(task))
    torch.set_num_threads(int(threads))
    torch.set_flush_denormal(True)
    # "medium" computes products of fp32 tensors in bfloat16 if the CPU supports it; saetrain chooses by itself.
    torch.set_float32_matmul_precision("highest" if chosen.fp32_products or chosen.tool == "saetrain" else "medium")
    print("\n" + json.dumps(train_and_score(Path(activations), chosen)))


if __name__ == "__main__":
    main()

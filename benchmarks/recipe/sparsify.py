"""eai-sparsify, trained by its own ``Trainer.fit`` over a model that returns the prepared activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor

from benchmarks.peers.sparsify import ReplayModel, TokenDataset
from benchmarks.recipe.task import Batches, Task
from benchmarks.recipe.worker import Reconstruct


class BatchSequence(Sequence[Tensor]):
    """The batches as sequences (1, N, D)."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: Any) -> Any:
        return self._batches[step].unsqueeze(0)


class TrainerWithoutSave(Trainer):
    """Writes no files."""

    def save(self) -> None:
        """Write nothing."""


def fit_sae(task: Task, batches: Batches) -> tuple[Reconstruct, dict[str, Any]]:
    """Train; with a given rate, also set a warm-up: signum has none, and Adam's 1000 steps exceed a short run."""
    schedule = {} if task.lr is None else {"lr": task.lr, "lr_warmup_steps": task.steps // 10}
    config = TrainConfig(
        SparseCoderConfig(num_latents=task.latents, k=task.k),
        batch_size=1,
        hookpoints=["layer"],
        init_seeds=[task.seed],
        save_every=10 * task.steps,
        log_to_wandb=False,
        **schedule,
        **task.options,
    )
    # The trainer runs the model once for the width, so training starts with batch 1 and ends with batch 0.
    trainer = TrainerWithoutSave(
        config,
        TokenDataset(torch.zeros(1, task.tokens, dtype=torch.long), task.steps),
        ReplayModel(BatchSequence(batches)),
    )
    group = trainer.optimizers[0].param_groups[0]
    lr = group.get("initial_lr", group["lr"])
    # The training weights are scored: the averages that signum saves have decoder rows shorter than one and worse FVU.
    trainer.fit()
    (sae,) = trainer.saes.values()

    def reconstruct(rows: Tensor) -> tuple[Tensor, Tensor]:
        values, indices, _ = sae.encode(rows)
        fired = torch.zeros(len(rows), task.latents, dtype=torch.bool).scatter_(1, indices, values > 0)
        return sae.decode(values, indices), fired

    return reconstruct, {"lr": lr}

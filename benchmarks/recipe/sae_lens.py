"""SAELens, trained by its own ``SAETrainer.fit``."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.peers.sae_lens import LR, build_sae
from benchmarks.recipe.task import Batches, Task
from benchmarks.recipe.worker import Reconstruct


def fit_sae(task: Task, batches: Batches) -> tuple[Reconstruct, dict[str, Any]]:
    """Train; with a given rate, also use a warm-up and a decay, which the defaults do not have."""
    torch.manual_seed(task.seed)
    sae = build_sae(task.architecture, batches[0].shape[1], task.latents, task.k, **task.options)
    lr = task.lr or LR
    schedule = {} if task.lr is None else {"lr_warm_up_steps": task.steps // 10, "lr_decay_steps": task.steps // 5}
    config = SAETrainerConfig(
        total_training_samples=task.steps * task.tokens,
        train_batch_size_samples=task.tokens,
        lr=lr,
        # SAELens' runner sets lr_end; without the runner it must be given.
        lr_end=lr / 10,
        device="cpu",
        **schedule,
    )
    SAETrainer(config, sae, iter(batches)).fit()

    def reconstruct(rows: Tensor) -> tuple[Tensor, Tensor]:
        code = sae.encode(rows)
        return sae.decode(code), code > 0

    return reconstruct, {"lr": lr}

"""dictionary_learning, trained by its own ``TopKTrainer.update``, as ``trainSAE`` calls it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers.dictionary_learning import build_trainer
from benchmarks.recipe.task import Batches, Task
from benchmarks.recipe.worker import Reconstruct


def fit_sae(task: Task, batches: Batches) -> tuple[Reconstruct, dict[str, Any]]:
    """Train; with a given rate, also use a warm-up and a decay that fit the run's length."""
    schedule = (
        {}
        if task.lr is None
        else {"lr": task.lr, "warmup_steps": task.steps // 10, "decay_start": task.steps - task.steps // 5}
    )
    options = dict(task.options)
    window = options.pop("dead_window", None)
    trainer = build_trainer(
        *(task.architecture, batches[0].shape[1], task.latents, task.k),
        steps=task.steps,
        seed=task.seed,
        **schedule | options,
    )
    if window is not None:
        trainer.dead_feature_threshold = window
    for step, batch in enumerate(batches):
        trainer.update(step, batch)

    def reconstruct(rows: Tensor) -> tuple[Tensor, Tensor]:
        code = trainer.ae.encode(rows)
        return trainer.ae.decode(code), code > 0

    return reconstruct, {"lr": trainer.lr}

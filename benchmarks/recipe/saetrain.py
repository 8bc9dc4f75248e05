"""saetrain's own trainer on the prepared activations, with all settings but the learning rate at their defaults."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.recipe.components import COMPONENTS, DECAY, kernels_without, normalizer_without
from benchmarks.recipe.task import Batches, Task
from benchmarks.recipe.worker import Reconstruct
from benchmarks.saetrain_runner import HOOKPOINT, build_sae_trainer
from saetrain.activations.extract import Activations
from saetrain.activations.normalize import fit_normalizers
from saetrain.coders.topk import TopKSettings
from saetrain.optim import AUTO_WEIGHT_DECAY, OptimSettings, resolve_warmup_steps
from saetrain.runs.train.setup import CALIBRATION_TOKENS
from saetrain.training.trainer import Trainer, TrainSettings


def fit_sae(task: Task, batches: Batches) -> tuple[Reconstruct, dict[str, Any]]:
    """Train with `--lr auto` or the task's rate; the option ``without`` names a component that is switched off."""
    options = {"without": None, "weight_decay": AUTO_WEIGHT_DECAY, **task.options}
    without, decay = options.pop("without"), options.pop("weight_decay")
    if without is not None:
        COMPONENTS[without]()
    optim = OptimSettings(lr=task.lr or "auto", weight_decay=0.0 if without == DECAY else decay)
    sample = torch.cat([batches[step] for step in range(min(len(batches), -(-CALIBRATION_TOKENS // task.tokens)))])
    found = fit_normalizers(Activations({HOOKPOINT: sample}, np.zeros(len(sample), dtype=np.int64), 0), {})[HOOKPOINT]
    normalizer, kernels = normalizer_without(without, found), kernels_without(without)
    settings = TopKSettings(k=task.k, num_latents=task.latents, **options)
    sae = build_sae_trainer(
        HOOKPOINT, normalizer, settings, kernels, "auto", task.tokens, optim=optim, steps=task.steps, seed=task.seed
    )
    trainer = Trainer(
        {HOOKPOINT: sae},
        TrainSettings(max_tokens=task.steps * task.tokens),
        tokens_per_step=task.tokens,
        warmup_steps=resolve_warmup_steps(optim, task.steps),
    )
    for _ in range(task.steps):
        trainer.train_step(lambda step: {HOOKPOINT: batches[step]})
    coder = sae.coder.folded(normalizer, normalizer)

    def reconstruct(rows: Tensor) -> tuple[Tensor, Tensor]:
        codes = coder.encode(rows)
        assert codes.indices is not None
        fired = torch.zeros(len(rows), task.latents, dtype=torch.bool)
        return coder.decode(codes), fired.scatter_(1, codes.indices.long(), codes.values > 0)

    return reconstruct, {"lr": sae.peak_lr}

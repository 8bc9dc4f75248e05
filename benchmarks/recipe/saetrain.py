"""saetrain's own trainer over the prepared activations, every setting but the learning rate at its default."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.recipe.components import DECAY, PIECES, kernels_without, normalizer_without
from benchmarks.recipe.task import Batches, Task
from benchmarks.recipe.worker import Rebuild
from benchmarks.saetrain_runner import HOOKPOINT, make_trainer
from saetrain.activations.normalize import calibrate
from saetrain.activations.read import Activations
from saetrain.coders.folding import folded
from saetrain.coders.topk import TopKSettings
from saetrain.optim import AUTO_DECAY, OptimSettings, warmup_steps
from saetrain.runs.prepare import CALIBRATION_TOKENS
from saetrain.training.trainer import Trainer, TrainSettings


def fit(task: Task, batches: Batches) -> tuple[Rebuild, dict[str, Any]]:
    """Train by `--lr auto`, or by the task's rate and else alike; the option ``without`` names a piece to leave out."""
    options = {"without": None, "weight_decay": AUTO_DECAY, **task.options}
    without, decay = options.pop("without"), options.pop("weight_decay")
    if without is not None:
        PIECES[without]()
    optim = OptimSettings(lr=task.lr or "auto", weight_decay=0.0 if without == DECAY else decay)
    sample = torch.cat([batches[step] for step in range(min(len(batches), -(-CALIBRATION_TOKENS // task.tokens)))])
    found = calibrate(Activations({HOOKPOINT: sample}, np.zeros(len(sample), dtype=np.int64), 0), {})[HOOKPOINT]
    normalizer, kernels = normalizer_without(without, found), kernels_without(without)
    settings = TopKSettings(k=task.k, num_latents=task.latents, **options)
    sae = make_trainer(
        HOOKPOINT, normalizer, settings, kernels, "auto", task.tokens, optim=optim, steps=task.steps, seed=task.seed
    )
    trainer = Trainer(
        {HOOKPOINT: sae},
        TrainSettings(max_tokens=task.steps * task.tokens),
        tokens=task.tokens,
        warmup=warmup_steps(optim, task.steps),
    )
    for _ in range(task.steps):
        trainer.train_step(lambda step: {HOOKPOINT: batches[step]})
    coder = folded(sae.coder, normalizer.mean, normalizer.scale, normalizer.axes)

    def rebuild(rows: Tensor) -> tuple[Tensor, Tensor]:
        codes = coder.encode(rows)
        assert codes.indices is not None
        fired = torch.zeros(len(rows), task.latents, dtype=torch.bool)
        return coder.decode(codes), fired.scatter_(1, codes.indices.long(), codes.values > 0)

    return rebuild, {"lr": sae.peak_lr}

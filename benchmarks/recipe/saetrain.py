"""saetrain's own trainer on the prepared activations, with all settings but the learning rate at their defaults."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.recipe.components import COMPONENTS, DECAY, kernels_without, normalizer_without
from benchmarks.recipe.task import Batches, Task
from benchmarks.recipe.worker import Reconstruct
from benchmarks.saetrain_runner import HOOKPOINT, build_sae_trainer, iterate_sae_batches
from saetrain.activations.extract import Activations
from saetrain.activations.normalize import fit_normalizers
from saetrain.coders import CODERS
from saetrain.optim import AUTO_WEIGHT_DECAY, OptimSettings, resolve_warmup_steps
from saetrain.runs.train.setup import CALIBRATION_TOKENS
from saetrain.training.trainer import Trainer, TrainSettings
from saetrain.types import Site


def fit_sae(task: Task, batches: Batches) -> tuple[Reconstruct, dict[str, Any]]:
    """Train with `--lr auto` or the task's rate; the option ``without`` names a component that is switched off."""
    options = {"without": None, "weight_decay": AUTO_WEIGHT_DECAY, **task.options}
    without, decay = options.pop("without"), options.pop("weight_decay")
    if without is not None:
        COMPONENTS[without]()
    optim = OptimSettings(lr=task.lr or "auto", weight_decay=0.0 if without == DECAY else decay)
    sample = torch.cat([batches[step] for step in range(min(len(batches), -(-CALIBRATION_TOKENS // task.tokens)))])
    activations = Activations({HOOKPOINT: sample}, np.zeros(len(sample), dtype=np.int64), 0)
    found = fit_normalizers(activations, {}, [Site.of_sae(HOOKPOINT)])[HOOKPOINT]
    normalizer, kernels = normalizer_without(without, found), kernels_without(without)
    settings = CODERS[task.architecture].Settings(k=task.k, num_latents=task.latents, **options)
    sae = build_sae_trainer(
        HOOKPOINT,
        normalizer,
        settings,
        kernels,
        "auto",
        task.tokens,
        architecture=task.architecture,
        optim=optim,
        steps=task.steps,
        seed=task.seed,
    )
    trainer = Trainer(
        {HOOKPOINT: sae},
        TrainSettings(max_tokens=task.steps * task.tokens),
        tokens_per_step=task.tokens,
        warmup_steps=resolve_warmup_steps(optim, task.steps),
    )
    micro_batches = iterate_sae_batches(lambda step: {HOOKPOINT: batches[step]})
    for _ in range(task.steps):
        trainer.train_step(micro_batches)
    last = range(max(0, task.steps - CALIBRATION_TOKENS // task.tokens), task.steps)
    ctx = sae.build_context(trainer.step, trainer.tokens_per_step, trainer.total_steps)
    sae.coder.calibrate((normalizer(batches[step]) for step in last), ctx)
    coder = sae.coder.folded(normalizer, normalizer).for_inference()

    def reconstruct(rows: Tensor) -> tuple[Tensor, Tensor]:
        codes = coder.encode(rows)
        return coder.decode(codes), codes.to_dense() != 0

    return reconstruct, {"lr": sae.peak_lr}

"""``--dry_run``: what the run would be and cost, from a few measured steps."""

from __future__ import annotations

import time

import torch

from saetrain.activations.shuffle import MixingBuffer
from saetrain.runs.prepare import Prepared, buffer_tokens
from saetrain.training.checkpoint import KEPT
from saetrain.training.trainer import Trainer

MEASURED_STEPS = 3
FLOAT = 4


def report(run: Prepared, trainer: Trainer, buffer: MixingBuffer) -> None:
    """Print layers, widths, parameters, memory, disk, steps and an estimate of the time; trains a few steps for it."""
    plan = run.plan
    print(f"model       {run.model.name} on {run.model.device}, {run.model.dtype}")
    parameters = 0
    for name, sae in trainer.saes.items():
        count = sum(parameter.numel() for parameter in sae.coder.parameters())
        parameters += count
        print(
            f"SAE         {name}: width {sae.coder.d_in}, {sae.coder.num_latents:,} latents, k {run.config.sae.k}, "
            f"{count:,} parameters"
        )
    print(f"memory      {gib(estimate_memory(run, trainer))} beside the program itself (estimated)")
    weights = parameters * FLOAT
    sae_files = weights * (2 if run.config.output.save_sparsify else 1)
    print(f"disk        {gib(3 * weights)} a checkpoint ({KEPT} kept), {gib(sae_files)} for the finished SAEs")
    print(f"steps       {plan.steps:,} of {plan.tokens_per_step:,} tokens = {plan.tokens:,} tokens")
    print(f"text        {plan.train_tokens:,} tokens, passed over {plan.epochs:.2f} times")
    per_step = measure(run, trainer, buffer)
    hours, rest = divmod(round(per_step * plan.steps), 3600)
    print(
        f"time        about {hours}:{rest // 60:02d}:{rest % 60:02d} at {plan.tokens_per_step / per_step:,.0f} tokens/s"
    )


def estimate_memory(run: Prepared, trainer: Trainer) -> int:
    """Bytes: model, SAEs with gradients and moments, mixing buffer, and one micro-step's pre-activations."""
    model = sum(p.numel() * p.element_size() for p in run.model.module.parameters())
    saes = sum(4 * FLOAT * p.numel() for sae in trainer.saes.values() for p in sae.coder.parameters())
    widths = sum(run.capture.widths.values())
    buffer = min(buffer_tokens(run), run.plan.tokens) * widths * run.model.dtype.itemsize
    micro = run.plan.tokens_per_step // run.config.train.grad_acc_steps
    widest = max(sae.coder.num_latents for sae in trainer.saes.values())
    return model + saes + buffer + 3 * micro * widest * FLOAT


def measure(run: Prepared, trainer: Trainer, buffer: MixingBuffer) -> float:
    """Seconds per optimizer step: the model's share by its tokens per second, the SAEs' by steps on one batch."""
    start = time.perf_counter()
    activations = run.reader.read(run.train.read(0, 0, run.config.base.model_batch_tokens)[0])
    model = (time.perf_counter() - start) / len(activations) * run.plan.tokens_per_step
    micro = run.plan.tokens_per_step // run.config.train.grad_acc_steps
    rows = torch.arange(micro, device=run.model.device) % len(activations)
    batch = {name: value[rows] for name, value in activations.values.items()}
    times = []
    for _ in range(MEASURED_STEPS):
        start = time.perf_counter()
        trainer.train_step(lambda micro: batch)
        _finish(run.model.device)
        times.append(time.perf_counter() - start)
    return model + sorted(times)[len(times) // 2]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gib(count: int) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"

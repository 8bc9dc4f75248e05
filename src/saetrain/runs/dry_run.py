"""``--dry_run``: what the run would be and cost, from a few measured steps."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from saetrain import launch
from saetrain.activations.normalize import Normalizer
from saetrain.optim import resolve_warmup_steps
from saetrain.runs.build import sae_names
from saetrain.runs.feed import make_feed
from saetrain.runs.kernels import choose_kernels
from saetrain.runs.metadata import rates
from saetrain.runs.prepare import Prepared
from saetrain.runs.resources import FLOAT, gib, memory_needed, memory_there, sae_parameters
from saetrain.training.checkpoint import MAX_CHECKPOINTS
from saetrain.training.trainer import MicroBatch, Trainer

MEASURED_STEPS = 3
MEASURED_TOKENS = 4096


def report(run: Prepared, trainer: Trainer, normalizers: dict[str, Normalizer]) -> None:
    """Print layers, widths, parameters, memory, disk, steps and an estimate of the time; trains a few steps for it."""
    plan = run.plan
    _print(f"model       {run.model.name} on {run.model.device}, {run.model.dtype}")
    kernels = choose_kernels(run.config.compute, run.config.optim, run.config.train.loss_fn, run.model.device)
    _print(f"kernels     {kernels.kernels}, products in {kernels.compute_dtype}")
    for name, sae in trainer.saes.items():
        count = sum(parameter.numel() for parameter in sae.coder.parameters())
        _print(
            f"SAE         {name}: width {sae.coder.d_in}, {sae.coder.num_latents:,} latents, k {run.config.sae.k}, "
            f"{count:,} parameters"
        )
    elsewhere = len(sae_names(run)) - len(trainer.saes)
    if elsewhere:
        _print(f"            and {elsewhere} more in other processes")
    optim = run.config.optim
    _print(
        f"rate        {rates(run.config, trainer)}, {resolve_warmup_steps(optim, plan.steps)} steps of warm-up, weight decay "
        f"{optim.effective_weight_decay:g}"
    )
    each = " in each process" if launch.world_size() > 1 else ""
    needed = memory_needed(run.config, run.model, run.capture.widths, run.framing.ctx_len, run.division)
    _print(f"memory      {gib(needed)}{each} beside the program itself, {gib(memory_there(run.model.device))} there")
    weights = sae_parameters(run.config, run.capture.widths) * FLOAT
    sae_files = weights * (2 if run.config.output.save_sparsify else 1)
    _print(
        f"disk        {gib(3 * weights)} a checkpoint ({MAX_CHECKPOINTS} kept), {gib(sae_files)} for the finished SAEs"
    )
    _print(f"steps       {plan.steps:,} of {plan.tokens_per_step:,} tokens = {plan.tokens:,} tokens")
    length = "streamed, of unknown length" if plan.train_tokens is None else f"{plan.train_tokens:,} tokens"
    _print(f"text        {length}; {plan.passes()}")
    per_step = measure(run, trainer) if run.head is None else measure_end_to_end(run, trainer, normalizers)
    hours, rest = divmod(round(per_step * plan.steps), 3600)
    _print(
        f"time        about {hours}:{rest // 60:02d}:{rest % 60:02d} at {plan.tokens_per_step / per_step:,.0f} tokens/s"
    )


def _print(text: str) -> None:
    if launch.rank() == 0:
        print(text)


def measure(run: Prepared, trainer: Trainer) -> float:
    """Seconds per optimizer step: the model's share by its tokens per second, the SAEs' by steps on one batch."""
    sequences = run.train.read(0, run.train.start_cursor, max(MEASURED_TOKENS, run.reader.batch_tokens))[0]
    run.reader.extract_all(sequences[:1])
    start = time.perf_counter()
    activations = run.reader.extract_all(sequences)
    model = (time.perf_counter() - start) / len(activations) * run.plan.tokens_per_step / launch.world_size()
    micro = run.plan.tokens_per_step // run.config.train.grad_acc_steps
    if not run.division.owners:
        micro //= launch.world_size()
    rows = torch.arange(micro, device=run.model.device) % len(activations)
    batch = {name: value[rows] for name, value in activations.values.items()}
    return model + _median(run, trainer, lambda micro: batch)


def measure_end_to_end(run: Prepared, trainer: Trainer, normalizers: dict[str, Normalizer]) -> float:
    """Seconds per optimizer step, with the model inside it."""
    feed = make_feed(run, normalizers)
    try:
        return _median(run, trainer, feed.micro_batch)
    finally:
        feed.close()


def _median(run: Prepared, trainer: Trainer, micro_batches: Callable[[int], MicroBatch]) -> float:
    times = []
    for _ in range(MEASURED_STEPS):
        start = time.perf_counter()
        trainer.train_step(micro_batches)
        _finish(run.model.device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

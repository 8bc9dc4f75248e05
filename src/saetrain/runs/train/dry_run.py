"""``--dry_run``: print the size and cost of a run, from a few measured steps."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from saetrain.activations.normalize import Normalizer
from saetrain.distributed import env
from saetrain.optim import resolve_warmup_steps
from saetrain.runs.train.batches import build_batch_source
from saetrain.runs.train.builders import sae_names
from saetrain.runs.train.choose_step import choose_kernels, step_request
from saetrain.runs.train.memory import (
    FP32_BYTES,
    available_memory_bytes,
    count_sae_parameters,
    format_bytes,
    required_memory_bytes,
)
from saetrain.runs.train.metadata import describe_lrs
from saetrain.runs.train.setup import RunContext
from saetrain.training.checkpoint import MAX_CHECKPOINTS
from saetrain.training.trainer import MicroBatch, Trainer

TIMED_STEPS = 3
TIMED_TOKENS = 4096


def report_dry_run(run: RunContext, trainer: Trainer, normalizers: dict[str, Normalizer]) -> None:
    """Print model, SAEs, memory, disk, steps and an estimate of the time, for which a few steps are trained."""
    plan = run.plan
    _print_rank0(f"model       {run.model.name} on {run.model.device}, {run.model.dtype}")
    kernels = choose_kernels(run.config.compute, step_request(run.config, run.model.device))
    _print_rank0(f"kernels     {kernels.kernels}, products in {kernels.compute_dtype}")
    for name, sae in trainer.saes.items():
        count = sum(parameter.numel() for parameter in sae.coder.parameters())
        _print_rank0(
            f"SAE         {name}: width {sae.coder.d_in}, {sae.coder.num_latents:,} latents, k {run.config.sae.k}, "
            f"{count:,} parameters"
        )
    elsewhere = len(sae_names(run)) - len(trainer.saes)
    if elsewhere:
        _print_rank0(f"            and {elsewhere} more in other processes")
    optim = run.config.optim
    warmup = resolve_warmup_steps(optim, plan.steps)
    _print_rank0(
        f"lr          {describe_lrs(run.config, trainer)}, {warmup} warm-up steps, weight decay "
        f"{optim.effective_weight_decay:g}"
    )
    per_process = " per process" if env.world_size() > 1 else ""
    needed = required_memory_bytes(run.config, run.model, run.capture.widths, run.framing.ctx_len, run.placement)
    available = format_bytes(available_memory_bytes(run.model.device))
    _print_rank0(f"memory      {format_bytes(needed)}{per_process} in addition to the program, {available} available")
    weights = count_sae_parameters(run.config, run.capture.widths) * FP32_BYTES
    sae_files = weights * (2 if run.config.output.save_sparsify else 1)
    _print_rank0(
        f"disk        {format_bytes(3 * weights)} per checkpoint ({MAX_CHECKPOINTS} are kept), "
        f"{format_bytes(sae_files)} for the trained SAEs"
    )
    _print_rank0(f"steps       {plan.steps:,} of {plan.tokens_per_step:,} tokens = {plan.n_tokens:,} tokens")
    length = "a stream of unknown length" if plan.train_tokens is None else f"{plan.train_tokens:,} tokens"
    _print_rank0(f"text        {length}; {plan.describe_passes()}")
    per_step = time_step(run, trainer) if run.head is None else time_end_to_end_step(run, trainer, normalizers)
    hours, rest = divmod(round(per_step * plan.steps), 3600)
    _print_rank0(
        f"time        about {hours}:{rest // 60:02d}:{rest % 60:02d} at {plan.tokens_per_step / per_step:,.0f} tokens/s"
    )


def _print_rank0(text: str) -> None:
    if env.rank() == 0:
        print(text)


def time_step(run: RunContext, trainer: Trainer) -> float:
    """Return seconds per optimizer step: the model's time per token, and the SAEs' time on one batch."""
    sequences = run.train_source.read(0, run.train_source.start_cursor, max(TIMED_TOKENS, run.extractor.batch_tokens))[
        0
    ]
    run.extractor.extract_all(sequences[:1])
    start = time.perf_counter()
    activations = run.extractor.extract_all(sequences)
    model_s = (time.perf_counter() - start) / len(activations) * run.plan.tokens_per_step / env.world_size()
    micro_tokens = run.plan.tokens_per_step // run.config.train.grad_acc_steps
    if not run.placement.owners:
        micro_tokens //= env.world_size()
    rows = torch.arange(micro_tokens, device=run.model.device) % len(activations)
    batch = {name: value[rows] for name, value in activations.values.items()}
    return model_s + _median_step_s(run, trainer, lambda micro: batch)


def time_end_to_end_step(run: RunContext, trainer: Trainer, normalizers: dict[str, Normalizer]) -> float:
    """Return seconds per optimizer step that includes the model."""
    batch_source = build_batch_source(run, normalizers)
    try:
        return _median_step_s(run, trainer, batch_source.get_micro_batch)
    finally:
        batch_source.close()


def _median_step_s(run: RunContext, trainer: Trainer, micro_batches: Callable[[int], MicroBatch]) -> float:
    times = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        trainer.train_step(micro_batches)
        _synchronize_device(run.model.device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _synchronize_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

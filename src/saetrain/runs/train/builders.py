"""Build the trainer and the normalizers of a run: new, from a saved SAE, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetrain import distributed
from saetrain.activations.normalize import Normalizer, fit_normalizers
from saetrain.coders import SparseCoder
from saetrain.config import RunConfig, to_flat
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.interop.finetune import initialize_from_sae
from saetrain.logs.console import log_rank0
from saetrain.optim import resolve_warmup_steps
from saetrain.runs.train.choose_step import build_train_step, choose_kernels, step_request
from saetrain.runs.train.setup import RunContext, read_calibration_sample, resolve_config, resolve_lr
from saetrain.training.checkpoint import Checkpoint
from saetrain.training.dead_latents import FiringTracker
from saetrain.training.trainer import SaeState, Trainer

MEASURING_PHASE = "measuring the activations"


@dataclass(frozen=True)
class TrainingRun:
    """A run that is ready to train; ``checkpoint``: the one that it resumes from, or None."""

    context: RunContext
    trainer: Trainer
    normalizers: dict[str, Normalizer]
    directory: Path
    checkpoint: Checkpoint | None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The resolved settings in flat form, as checkpoints and logs store them."""
        return to_flat(resolve_config(self.context))


def build_trainer(run: RunContext, checkpoint: Checkpoint | None) -> tuple[Trainer, dict[str, Normalizer]]:
    """Return the trainer of this rank's SAEs, and {hookpoint: normalizer}; restores both from ``checkpoint``."""
    if run.config.finetune is not None and len(run.config.train.init_seeds) > 1:
        raise SaetrainError("--finetune with several --init_seeds: all would start from the same SAE; pass one seed")
    normalizers = measure_normalizers(run) if checkpoint is None else load_normalizers(run, checkpoint)
    saes: dict[str, SaeState] = {}
    for name, (hookpoint, seed) in sae_names(run).items():
        if not run.placement.is_owned_by(hookpoint, env.rank()):
            continue
        coder = build_coder(run, hookpoint, normalizers[hookpoint], seed, fresh=checkpoint is None)
        saes[name] = build_sae_state(run, hookpoint, coder, normalizers[hookpoint], seed)
        if checkpoint is not None:
            saes[name].load_state_dict(checkpoint.tensors[name], checkpoint.values["losses"][name])
            # Both depend on the length of the run, which a resume may have changed.
            saes[name].peak_lr, saes[name].firing.window_tokens = checkpoint.values["rates"][name]
    trainer = Trainer(
        saes,
        run.config.train,
        tokens_per_step=run.plan.tokens_per_step,
        warmup_steps=resolve_warmup_steps(run.config.optim, run.plan.steps),
        is_data_parallel=is_data_parallel(run),
    )
    trainer.step = checkpoint.values["step"] if checkpoint else 0
    return trainer, normalizers


def sae_names(run: RunContext) -> dict[str, tuple[str, int]]:
    """Return {SAE: (hookpoint, seed)} of the whole run, including the SAEs of other ranks."""
    seeds = run.config.train.init_seeds
    return {
        hookpoint if number == 0 else f"{hookpoint}/seed{seed}": (hookpoint, seed)
        for hookpoint in run.hookpoints
        for number, seed in enumerate(seeds)
    }


def is_data_parallel(run: RunContext) -> bool:
    """Return whether every rank trains every SAE on a part of the tokens."""
    return env.world_size() > 1 and not run.placement.owners


def measure_normalizers(run: RunContext) -> dict[str, Normalizer]:
    """Return {hookpoint: normalizer}, measured on the first training tokens; all ranks use those of rank 0."""
    normalizers: dict[str, Normalizer] = {}
    if env.rank() == 0:
        with distributed.phase(MEASURING_PHASE):
            normalizers = _measure_on_this_rank(run)
    constants = distributed.broadcast_from_rank0(
        {name: value.scalar_constants() for name, value in normalizers.items()}, MEASURING_PHASE
    )
    parts = {
        (name, part): value for name, each in normalizers.items() for part, value in each.tensor_constants().items()
    }
    sent = distributed.broadcast_tensors({":".join(key): value for key, value in parts.items()}, MEASURING_PHASE)
    tensors = {name: {part: sent[f"{name}:{part}"] for part in ("mean", "axes")} for name in run.hookpoints}
    return _build_normalizers(run, constants, tensors)


def _measure_on_this_rank(run: RunContext) -> dict[str, Normalizer]:
    log_rank0("measuring mean, scale and principal axes of the activations")
    sample = read_calibration_sample(run)
    normalizers = fit_normalizers(sample, run.extractor.norm_limits)
    kept = len(sample)
    for name, normalizer in normalizers.items():
        outliers = int((sample.values[name].float().norm(dim=1) > normalizer.norm_limit).sum())
        log_rank0(
            f"{name}: width {len(normalizer.mean)}, ‖mean‖/‖std‖ {normalizer.mean_to_std:.2f}, "
            f"{outliers / kept:.2%} of tokens excluded as norm outliers"
        )
    return normalizers


def load_normalizers(run: RunContext, checkpoint: Checkpoint) -> dict[str, Normalizer]:
    """Return {hookpoint: normalizer} from a checkpoint."""
    tensors = {name: checkpoint.tensors[f"normalizer:{name}"] for name in run.hookpoints}
    return _build_normalizers(run, checkpoint.values["normalizers"], tensors)


def _build_normalizers(
    run: RunContext, constants: dict[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Normalizer]:
    """Return the normalizers with these constants, and set the norm limits of the extractor."""
    normalizers = {}
    for name in run.hookpoints:
        values, own = constants[name], {part: value.to(run.model.device) for part, value in tensors[name].items()}
        limit = values["norm_limit"] if values["norm_limit"] is not None else float("inf")
        normalizers[name] = Normalizer(scale=values["scale"], variance=values["variance"], norm_limit=limit, **own)
    if run.config.buffer.exclude_sinks:
        run.extractor.norm_limits = {name: normalizer.norm_limit for name, normalizer in normalizers.items()}
    return normalizers


def build_coder(run: RunContext, hookpoint: str, normalizer: Normalizer, seed: int, *, fresh: bool) -> SparseCoder:
    """Return a coder with initial weights, or with those of --finetune unfolded to take normalized activations."""
    coder = run.config.coder_class.build(run.config.sae, len(normalizer.mean), seed=seed).to(run.model.device)
    if run.config.finetune is not None and fresh:
        modules = [name for name, _ in run.model.module.named_modules()]
        remark = initialize_from_sae(coder, run.config.finetune, hookpoint, modules, run.weights_sha256)
        log_rank0(f"{hookpoint}: starts from the SAE in {run.config.finetune}")
        if remark:
            log_rank0(remark)
        coder.unfold_(normalizer, normalizer)
    return coder


def build_sae_state(run: RunContext, hookpoint: str, coder: SparseCoder, normalizer: Normalizer, seed: int) -> SaeState:
    """Return the training state of one coder."""
    config: RunConfig = run.config
    device: torch.device = run.model.device
    kernels = choose_kernels(config.compute, step_request(config, device))
    window = config.dead.resolve_window(config.train.max_tokens, coder.num_latents, coder.expected_l0())
    return SaeState(
        hookpoint,
        coder,
        partial(normalizer, bf16=kernels.compute_dtype == "bfloat16"),
        build_train_step(
            coder, kernels, config.optim, no_accumulation=config.train.grad_acc_steps == 1 and not is_data_parallel(run)
        ),
        FiringTracker(coder.num_latents, window, config.dead.dead_percentage_threshold, device),
        data_variance=normalizer.scaled_variance,
        mse_per_fvu=normalizer.variance / coder.d_in,
        peak_lr=resolve_lr(run, coder),
        seed=seed,
        dead_bias_lr_multiplier=config.dead_bias_lr_multiplier if coder.lifts_dead_biases else 0.0,
        stop_on_spike=config.train.on_spike == "stop",
    )

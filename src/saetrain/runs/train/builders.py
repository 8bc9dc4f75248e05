"""Build the trainer and the normalizers of a run: new, from a saved SAE, or from a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain import distributed
from saetrain.activations.normalize import Normalizer, compute_norm_limits, fit_normalizers
from saetrain.coders import SparseCoder
from saetrain.config import to_flat
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.interop.finetune import initialize_from_sae
from saetrain.logs.console import log_rank0
from saetrain.runs.train.choose_step import build_train_step
from saetrain.runs.train.plan import SaePlan
from saetrain.runs.train.setup import RunContext, read_calibration_sample, resolve_config
from saetrain.training.checkpoint import Checkpoint
from saetrain.training.dead_latents import FiringTracker
from saetrain.training.sae_state import SaeState
from saetrain.training.trainer import EndedSae, Trainer

MEASURING_PHASE = "measuring the activations"


@dataclass(frozen=True)
class TrainingRun:
    """A run that is ready to train; ``checkpoint``: the one that it resumes from, or None.

    ``normalizers`` {name of a site's inputs or outputs: normalizer}.
    """

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
    """Return the trainer of this rank's SAEs and the normalizers; restores both from ``checkpoint``."""
    if run.config.finetune is not None and len(run.plans) > len(run.sites):
        raise SaetrainError("--finetune with several SAEs per hookpoint: all would start from the same SAE; train one")
    normalizers = measure_normalizers(run) if checkpoint is None else load_normalizers(run, checkpoint)
    saes: dict[str, SaeState] = {}
    # SAEs with the same function share its results.
    find_function = functools.cache(lambda name, bf16: partial(normalizers[name], bf16=bf16))
    for name, plan in run.plans.items():
        if not run.resolved.placement.is_owned_by(name, env.rank()):
            continue
        coder = build_coder(run, plan, normalizers, fresh=checkpoint is None)
        saes[name] = build_sae_state(run, name, coder, normalizers, find_function)
        if checkpoint is not None:
            try:
                saes[name].load_state_dict(checkpoint.tensors[name], checkpoint.values["losses"][name])
            except (KeyError, RuntimeError) as error:
                raise SaetrainError(
                    f"--resume: checkpoint {checkpoint.path}: the tensors of {name} are not those of the run: {error}"
                ) from error
    trainer = Trainer(
        saes,
        run.config.train,
        tokens_per_step=run.resolved.tokens_per_step,
        warmup_steps=run.resolved.warmup_steps,
        is_data_parallel=run.resolved.is_data_parallel,
    )
    if checkpoint is not None:
        trainer.step = checkpoint.values["step"]
        trainer.ended = {name: EndedSae(**each) for name, each in checkpoint.values["ended"].items()}
    return trainer, normalizers


def measure_normalizers(run: RunContext) -> dict[str, Normalizer]:
    """Return the normalizers, measured on the first training tokens; all ranks use those of rank 0."""
    normalizers: dict[str, Normalizer] = {}
    limits: dict[str, float] = {}
    if env.rank() == 0:
        with distributed.phase(MEASURING_PHASE):
            normalizers, limits = _measure_on_this_rank(run)
    constants, limits = distributed.broadcast_from_rank0(
        ({name: value.scalar_constants() for name, value in normalizers.items()}, limits), MEASURING_PHASE
    )
    parts = {
        f"{name}:{part}": value for name, each in normalizers.items() for part, value in each.tensor_constants().items()
    }
    sent = distributed.broadcast_tensors(parts, MEASURING_PHASE)
    tensors = {name: {part: sent[f"{name}:{part}"] for part in ("mean", "axes")} for name in constants}
    return _build_normalizers(run, constants, limits, tensors)


def _measure_on_this_rank(run: RunContext) -> tuple[dict[str, Normalizer], dict[str, float]]:
    """Return the normalizers, and {hookpoint: norm limit}."""
    log_rank0("measuring mean, scale and principal axes of the activations")
    sample = read_calibration_sample(run)
    limits = compute_norm_limits(sample) if run.config.buffer.exclude_sinks else {}
    normalizers = fit_normalizers(sample, limits, run.sites.values())
    for name, normalizer in normalizers.items():
        norms = sample.values[name].float().norm(dim=1) if name in limits else normalizer.mean.new_zeros(1)
        outliers = int((norms > limits.get(name, float("inf"))).sum())
        log_rank0(
            f"{name}: width {len(normalizer.mean)}, ‖mean‖/‖std‖ {normalizer.mean_to_std:.2f}, "
            f"{outliers / len(sample):.2%} of tokens excluded as norm outliers"
        )
    return normalizers, limits


def load_normalizers(run: RunContext, checkpoint: Checkpoint) -> dict[str, Normalizer]:
    """Return the normalizers from a checkpoint."""
    constants, limits = checkpoint.values["normalizers"], checkpoint.values["norm_limits"]
    tensors = {name: checkpoint.tensors[f"normalizer:{name}"] for name in constants}
    return _build_normalizers(run, constants, limits, tensors)


def _build_normalizers(
    run: RunContext,
    constants: Mapping[str, dict[str, float]],
    limits: dict[str, float],
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Normalizer]:
    """Return the normalizers with these constants, and set the norm limits of the extractor."""
    run.extractor.set_norm_limits(limits)
    return {
        name: Normalizer(
            mean=tensors[name]["mean"].to(run.model.device), axes=tensors[name]["axes"].to(run.model.device), **values
        )
        for name, values in constants.items()
    }


def build_coder(run: RunContext, plan: SaePlan, normalizers: Mapping[str, Normalizer], *, fresh: bool) -> SparseCoder:
    """Return a coder with initial weights, or with those of --finetune unfolded to take normalized activations."""
    site, config = plan.site, plan.config
    d_in, d_out = site.sum_widths(run.extractor.capture.widths)
    coder = config.coder_class.build(config.sae, d_in, None if site.is_sae else d_out, seed=plan.seed)
    coder = coder.to(run.model.device)
    if run.config.finetune is not None and fresh:
        modules = [name for name, _ in run.model.module.named_modules()]
        remark = initialize_from_sae(coder, run.config.finetune, site.name, modules, run.weights_sha256)
        log_rank0(f"{site.name}: starts from the SAE in {run.config.finetune}")
        if remark:
            log_rank0(remark)
        coder.unfold_(normalizers[site.x_name], normalizers[site.y_name])
    return coder


def build_sae_state(
    run: RunContext,
    name: str,
    coder: SparseCoder,
    normalizers: Mapping[str, Normalizer],
    find_function: Callable[[str, bool], Callable[[Tensor], Tensor]],
) -> SaeState:
    """Return the training state of the coder of the SAE ``name``.

    ``find_function`` maps the name of a normalizer, and whether its results are bf16, to a function.
    """
    plan, resolved, device = run.plans[name], run.resolved, run.model.device
    site, config, kernels = plan.site, plan.config, resolved.kernels[name]
    outputs = normalizers[site.y_name]
    use_bf16 = kernels.compute_dtype == "bfloat16"
    no_accumulation = config.train.grad_acc_steps == 1 and not resolved.is_data_parallel
    window = resolved.dead_windows[name]
    return SaeState(
        site,
        coder,
        find_function(site.x_name, use_bf16),
        find_function(site.y_name, use_bf16),
        build_train_step(coder, kernels, config.optim, no_accumulation=no_accumulation),
        FiringTracker(coder.num_latents, window, config.dead.dead_percentage_threshold, device),
        data_variance=outputs.scaled_variance,
        mse_per_fvu=outputs.variance / coder.d_out,
        peak_lr=resolved.lrs[name],
        seed=plan.seed,
        dead_bias_lr_multiplier=config.dead_bias_lr_multiplier if coder.lifts_dead_biases else 0.0,
        stop_on_spike=config.train.on_spike == "stop",
    )

"""Describe a run: in the metadata of its SAEs, in the log at its start, and in the summary at its end."""

from __future__ import annotations

import os
from pathlib import Path

from saetrain.activations.model import DTYPES
from saetrain.coders import SparseCoder
from saetrain.config import RunConfig
from saetrain.distributed import env
from saetrain.interop.metadata import SaeMetadata
from saetrain.logs.console import log_rank0
from saetrain.optim import describe_small_sgd_lr, describe_unusual_lr
from saetrain.runs.train.builders import sae_names
from saetrain.runs.train.choose_step import choose_kernels, step_request
from saetrain.runs.train.setup import RunContext
from saetrain.training.dead_latents import min_dead_fraction
from saetrain.training.trainer import Trainer


def build_run_metadata(run: RunContext, trainer: Trainer) -> SaeMetadata:
    """Return the metadata that all SAEs of the run share: model, text, token policy and training."""
    config = run.config
    kernels = choose_kernels(config.compute, step_request(config, run.model.device))
    locations = [absolute_location(name) for name in config.dataset]
    return SaeMetadata(
        model=absolute_location(config.model),
        model_revision=run.model.revision,
        model_weights_sha256=run.weights_sha256,
        model_dtype=next(name for name, dtype in DTYPES.items() if dtype is run.model.dtype),
        dataset=locations[0] if len(locations) == 1 else locations,
        mix=None if len(locations) == 1 else list(run.plan.shares),
        dataset_config=config.source.dataset_config,
        split=config.source.split,
        streaming=config.source.streaming,
        skip_bad_rows=config.source.skip_bad_rows,
        eval_tokens=config.evaluation.eval_tokens,
        **run.text_metadata,
        ctx_len=run.framing.ctx_len,
        causal=run.framing.causal,
        prepend_bos=run.framing.bos is not None,
        exclude_special_tokens=config.tokens.exclude_special_tokens,
        exclude_sinks=config.buffer.exclude_sinks,
        loss_fn=config.train.loss_fn,
        finetuned_from=config.finetune,
        kernels=kernels.kernels,
        compute_dtype=kernels.compute_dtype,
        processes=env.world_size(),
        tokens_seen=trainer.tokens_seen,
        steps=trainer.step,
    )


def absolute_location(name: str) -> str:
    """Return hub ids unchanged and local paths in full, so that the SAE's files work from any folder."""
    return str(Path(name).resolve()) if os.path.exists(name) else name


def hook_name(run: RunContext, hookpoint: str) -> str:
    """Return TransformerLens' name of a causal model's residual stream, which SAELens expects; else the module's."""
    if run.model.causal and run.config.where.hookpoints is None:
        return f"blocks.{hookpoint.rsplit('.', 1)[1]}.hook_resid_post"
    return hookpoint


def log_run_start(run: RunContext, trainer: Trainer) -> None:
    """Log what will be trained on what, and warn about settings that are probably mistakes."""
    plan, config = run.plan, run.config
    leftover_tokens = config.train.max_tokens - plan.n_tokens
    if 0 < trainer.step < trainer.total_steps:
        log_rank0(f"{trainer.total_steps - trainer.step} of {trainer.total_steps} steps are left")
    count = len(sae_names(run))
    kernels = choose_kernels(config.compute, step_request(config, run.model.device))
    log_rank0(f"kernels: {kernels.kernels}, products in {kernels.compute_dtype} (--kernels, --compute_dtype)")
    if trainer.step == trainer.total_steps:
        log_rank0(f"all {trainer.total_steps} steps are done; writing and evaluating the SAEs again")
        return
    log_rank0(
        f"training {count} SAE{'s' if count > 1 else ''} for {plan.steps} steps of "
        f"{plan.tokens_per_step:,} tokens ({plan.n_tokens:,} in total; {leftover_tokens:,} of --max_tokens unused), "
        f"{plan.describe_passes()}, at lr {describe_lrs(config, trainer)}"
    )
    if config.train.end_to_end:
        log_rank0(
            f"each micro-batch has {config.train.batch_size} whole sequences, which count as {run.framing.ctx_len} "
            "tokens each towards --max_tokens, even if they are shorter"
        )
    if config.dead.dead_feature_threshold is not None:
        log_rank0("--dead_feature_threshold is deprecated: use --dead_window_tokens")
    coders = [sae.coder for sae in trainer.saes.values()]
    widths = sorted({coder.d_in for coder in coders if config.sae.k >= coder.d_in})
    if widths:
        log_rank0(
            f"--k {config.sae.k} is at least the activation width {widths[0]}, so the code is not sparse; lower --k"
        )
    for coder in {coder.num_latents: coder for coder in coders}.values():
        if not config.dead_bias_lr_multiplier and coder.dead_latents_advice:
            log_rank0(f"dead latents stay dead in this run; {coder.dead_latents_advice}")
        remark = _describe_lr_risk(run, coder)
        if remark:
            log_rank0(remark)
        warn_unreachable_threshold(coder, config.dead.dead_percentage_threshold)


def describe_lrs(config: RunConfig, trainer: Trainer) -> str:
    """Return the peak learning rates of this rank's SAEs, and whether --lr auto chose them."""
    found = sorted({f"{sae.peak_lr:.3g}" for sae in trainer.saes.values()})
    return " and ".join(found) + (" (--lr auto)" if config.optim.lr == "auto" else "")


def _describe_lr_risk(run: RunContext, coder: SparseCoder) -> str | None:
    """Return a warning about an unusual learning rate, or None."""
    lr, plan = run.config.optim.lr, run.plan
    recommended = coder.recommended_lr(plan.tokens_per_step, plan.steps)
    if lr == "auto":
        return None
    if run.config.optim.optimizer == "sgd":
        return describe_small_sgd_lr(lr)
    if recommended is None or not run.config.has_lr_rule:
        return None
    size = f"{coder.num_latents} latents, L0 {coder.expected_l0():g} and {plan.steps} steps of {plan.tokens_per_step}"
    return describe_unusual_lr(lr, recommended, f"{size} tokens")


def warn_unreachable_threshold(coder: SparseCoder, threshold: float) -> None:
    """Log a warning if the rate rule counts some latents as dead whatever the training does."""
    l0 = coder.expected_l0()
    bound = min_dead_fraction(l0, coder.num_latents, threshold) if l0 is not None else 0.0
    if l0 is not None and bound > 0:
        log_rank0(
            f"with an L0 of {l0:g} at most {int(l0 / threshold):,} of {coder.num_latents:,} latents can fire on "
            f"{threshold:.3%} of tokens, so at least {bound:.1%} count as dead by --dead_percentage_threshold whatever "
            "the training does"
        )


def log_run_summary(directory: Path, metrics: dict[str, dict[str, float]]) -> None:
    """Print the held-out metrics of each SAE and the paths of the results."""
    name_width = max(map(len, metrics))
    print(f"{'SAE':<{name_width}}     FVU  expl.var      L0  never fired  dead by rate  redundancy (random)")
    for name, row in metrics.items():
        print(
            f"{name:<{name_width}} {row['fvu']:7.4f} {row['explained_variance']:9.4f} {row['l0']:7.2f} "
            f"{row['dead_never_fired']:12.1%} {row['dead_below_threshold']:13.1%} "
            f"{row['decoder_redundancy_top100']:10.3f} ({row['decoder_redundancy_top100_random']:.3f})"
        )
    tokens = next(iter(metrics.values()))["tokens"]
    print(f"on {tokens:,.0f} held-out tokens; run in {directory}, SAEs in {directory / 'sae'}")
    unusable = [name for name, row in metrics.items() if not row["fvu"] < 1]
    if unusable:
        print(
            f"WARNING: {', '.join(unusable)}: worse than predicting the mean (FVU is not below 1), so not usable; "
            "try more tokens, another --lr or a lower --k"
        )

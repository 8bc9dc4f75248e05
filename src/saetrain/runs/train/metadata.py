"""Describe a run: in the metadata of its SAEs, in the log at its start, and in the summary at its end."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from saetrain.activations.model import DTYPES
from saetrain.coders import SparseCoder
from saetrain.config import RunConfig
from saetrain.distributed import env
from saetrain.errors import DivergedRun
from saetrain.interop.metadata import SaeMetadata
from saetrain.logs.console import log_rank0, print_rank0
from saetrain.optim import describe_small_sgd_lr, describe_unusual_lr
from saetrain.runs.run_dir import SAES_DIR
from saetrain.runs.sae_table import build_sae_table, open_console
from saetrain.runs.train.setup import RunContext
from saetrain.training.dead_latents import min_dead_fraction
from saetrain.training.trainer import EndedSae, Trainer
from saetrain.types import Site


def build_run_metadata(run: RunContext, trainer: Trainer) -> SaeMetadata:
    """Return the metadata that all SAEs of the run share: model, text, token policy and training."""
    config = run.config
    locations = [absolute_location(name) for name in config.dataset]
    return SaeMetadata(
        model=absolute_location(config.model),
        model_revision=run.model.revision,
        model_weights_sha256=run.weights_sha256,
        model_dtype=next(name for name, dtype in DTYPES.items() if dtype is run.model.dtype),
        dataset=locations[0] if len(locations) == 1 else locations,
        mix=None if len(locations) == 1 else list(config.mixing.normalized_shares(len(locations))),
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
        processes=env.world_size(),
    )


def absolute_location(name: str) -> str:
    """Return hub ids unchanged and local paths in full, so that the SAE's files work from any folder."""
    return str(Path(name).resolve()) if os.path.exists(name) else name


def hook_name(run: RunContext, site: Site) -> str:
    """Return TransformerLens' name of a causal model's residual stream, which SAELens expects; else the module's."""
    if run.model.causal and site.is_sae and run.config.where.hookpoints is None:
        return f"blocks.{site.name.rsplit('.', 1)[1]}.hook_resid_post"
    return site.name


def describe_passes(run: RunContext) -> str:
    """Return a phrase about how often the run passes over its text."""
    shares = run.config.mixing.normalized_shares(len(run.config.dataset))
    rows = zip(run.config.dataset, shares, run.text_tokens, strict=True)
    counts = {
        name: f"{run.resolved.n_tokens * share / max(tokens, 1):.2f} passes over" if tokens is not None else "streaming"
        for name, share, tokens in rows
    }
    if len(counts) > 1:
        return ", ".join(f"{count} {name}" for name, count in counts.items())
    (count,) = counts.values()
    return f"{count} the text" + ("" if run.train_tokens is not None else ", so the number of passes is unknown")


def log_run_start(run: RunContext, trainer: Trainer) -> None:
    """Log what will be trained on what, and warn about settings that are probably mistakes."""
    resolved, config = run.resolved, run.config
    leftover_tokens = config.train.max_tokens - resolved.n_tokens
    if 0 < trainer.step < trainer.total_steps:
        log_rank0(f"{trainer.total_steps - trainer.step} of {trainer.total_steps} steps are left")
    count = len(run.plans)
    log_rank0(f"kernels: {describe_kernels(run)} (--kernels, --compute_dtype)")
    if trainer.step == trainer.total_steps:
        log_rank0(f"all {trainer.total_steps} steps are done; writing and evaluating the SAEs again")
        return
    log_rank0(
        f"training {count} SAE{'s' if count > 1 else ''} for {resolved.steps} steps of "
        f"{resolved.tokens_per_step:,} tokens ({resolved.n_tokens:,} in total; {leftover_tokens:,} of --max_tokens "
        f"unused), {describe_passes(run)}, at lr {describe_lrs(config, trainer)}"
    )
    if config.train.end_to_end:
        log_rank0(
            f"each micro-batch has {config.train.batch_size} whole sequences, which count as {run.framing.ctx_len} "
            "tokens each towards --max_tokens, even if they are shorter"
        )
    if config.dead.dead_feature_threshold is not None:
        log_rank0("--dead_feature_threshold is deprecated: use --dead_window_tokens")
    coders = [sae.coder for sae in trainer.saes.values()]
    dense = [coder for coder in coders if (coder.expected_l0() or 0) >= coder.d_in]
    if dense:
        log_rank0(
            f"--k {dense[0].expected_l0():g} is at least the activation width {dense[0].d_in}, so the code is not "
            "sparse; lower --k"
        )
    remarks: dict[str | None, None] = {}
    for name, sae in trainer.saes.items():
        if not config.dead_bias_lr_multiplier and sae.coder.dead_latents_advice:
            remarks[f"dead latents stay dead in this run; {sae.coder.dead_latents_advice}"] = None
        remarks[describe_lr_risk(run, name, sae.coder)] = None
        remarks[describe_unreachable_threshold(sae.coder, config.dead.dead_percentage_threshold)] = None
    for remark in filter(None, remarks):
        log_rank0(remark)


def describe_kernels(run: RunContext) -> str:
    """Return a phrase about the training steps of the run's SAEs and the dtypes of their products."""
    found = dict.fromkeys(f"{each.kernels}, products in {each.compute_dtype}" for each in run.resolved.kernels.values())
    return "; ".join(found)


def describe_lrs(config: RunConfig, trainer: Trainer) -> str:
    """Return the peak learning rates of this rank's SAEs, and whether --lr auto chose them."""
    found = sorted({sae.peak_lr for sae in trainer.saes.values()})
    is_auto = "auto" in {config.optim.lr, *(point.get("lr") for point in config.grid)}
    return ", ".join(f"{lr:.3g}" for lr in found) + (" (--lr auto)" if is_auto else "")


def describe_lr_risk(run: RunContext, sae: str, coder: SparseCoder) -> str | None:
    """Return a warning about an unusual learning rate of the SAE with this name, or None."""
    lr, per_step, steps = run.plans[sae].config.optim.lr, run.resolved.tokens_per_step, run.resolved.steps
    recommended = coder.recommended_lr(per_step, steps)
    if lr == "auto":
        return None
    if run.config.optim.optimizer == "sgd":
        return describe_small_sgd_lr(lr)
    if recommended is None or not run.config.has_lr_rule:
        return None
    l0 = coder.expected_l0()
    sparsity = "" if l0 is None else f", L0 {l0:g}"
    size = f"{coder.num_latents} latents{sparsity} and {steps} steps of {per_step} tokens"
    return describe_unusual_lr(lr, recommended, size)


def describe_unreachable_threshold(coder: SparseCoder, threshold: float) -> str | None:
    """Return a warning if the rate rule counts some latents as dead whatever the training does, or None."""
    l0 = coder.expected_l0()
    bound = min_dead_fraction(l0, coder.num_latents, threshold) if l0 is not None else 0.0
    if l0 is None or bound <= 0:
        return None
    return (
        f"with an L0 of {l0:g} at most {int(l0 / threshold):,} of {coder.num_latents:,} latents can fire on "
        f"{threshold:.3%} of tokens, so at least {bound:.1%} count as dead by --dead_percentage_threshold whatever "
        "the training does"
    )


def log_next_steps(directory: Path, sae: str, *, has_model: bool, is_assessed: bool) -> None:
    """Print the commands that a user may type after a run; ``sae``: the name of one of its SAEs."""
    if not has_model:
        print_rank0(f"next:  python: saetrain.load('{directory / SAES_DIR / sae}')")
        return
    print_rank0(f"next:  saetrain evaluate {directory}   (every metric, baseline and reason)")
    if is_assessed:
        print_rank0(f"       saetrain compare {directory} OTHER_RUN")
    print_rank0(f"       python: saetrain.load('{directory / SAES_DIR / sae}')")


def log_run_summary(metrics: dict[str, dict[str, float]], *, will_assess: bool) -> None:
    """Print the held-out metrics of each SAE, unless an assessment follows, and warn about SAEs without use."""
    if not will_assess:
        console, tokens = open_console(), next(iter(metrics.values()))["tokens"]
        console.print(f"on {tokens:,.0f} held-out tokens:")
        console.print(build_sae_table({"SAE": list(metrics)}, list(metrics.values())))
    unusable = [name for name, row in metrics.items() if not row["fvu"] < 1]
    if unusable:
        print_rank0(
            f"WARNING: {', '.join(unusable)}: worse than predicting the mean (FVU is not below 1), so not usable; "
            "try more tokens, another --lr or a lower --k"
        )


def raise_if_diverged(
    directory: Path,
    config: RunConfig,
    metrics: dict[str, dict[str, float]],
    ended: Mapping[str, EndedSae] | None = None,
) -> None:
    """Raise DivergedRun if a held-out FVU is not a number or, in a run that minimizes the FVU, is above 1.

    ``ended``: SAEs that ended at a loss spike, which also raise it.
    """
    limit = math.inf if config.train.end_to_end else 1
    diverged = {name: row["fvu"] for name, row in metrics.items() if not row["fvu"] <= limit}
    parts = []
    if ended:
        shown = ", ".join(f"{name} at step {each.spike_step}" for name, each in ended.items())
        parts.append(f"{len(ended)} of {len(metrics)} SAEs ended at a loss spike ({shown})")
    if diverged:
        name, fvu = max(diverged.items(), key=lambda item: (math.isnan(item[1]), item[1]))
        found = "FVU nan, not a number" if math.isnan(fvu) else f"FVU {fvu:.4g}, above 1"
        parts.append(
            f"{len(diverged)} of {len(metrics)} SAEs reconstruct held-out text worse than its mean does ({name}: "
            f"{found})"
        )
    if not parts:
        return
    lr = "a lower --lr" if config.optim.lr == "auto" or not config.has_lr_rule else "--lr auto or a lower --lr"
    error = DivergedRun(
        f"the run diverged: {'; '.join(parts)}; they are saved in {directory / 'sae'}; start a new run with {lr}"
    )
    if not env.will_be_restarted():
        raise error
    log_rank0(f"{error} (exit code 0, because torchrun would restart the run after another one)")

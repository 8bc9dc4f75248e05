"""``--dry_run``: print the size and cost of a run, and the time of each phase, from a few measured steps."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import torch

from saetrain.activations.cache_files import parse_size, resolve_cache_dir
from saetrain.activations.cache_key import describe_activations
from saetrain.activations.capture import pad_batch
from saetrain.activations.normalize import Normalizer
from saetrain.distributed import env
from saetrain.evaluation.baselines import Baselines, RunningMoments
from saetrain.evaluation.evaluator import evaluate_coders
from saetrain.features.settings import DEFAULT_FEATURE_TOKENS
from saetrain.logs.console import format_duration, print_rank0
from saetrain.report.decoder_map import MAX_SAMPLED_ROWS
from saetrain.runs.train.batches import build_batch_source
from saetrain.runs.train.memory import (
    FP32_BYTES,
    available_memory_bytes,
    count_sae_parameters,
    format_bytes,
    required_memory_bytes,
)
from saetrain.runs.train.metadata import describe_kernels, describe_lr_risk, describe_lrs, describe_passes
from saetrain.runs.train.resolve import count_parameters
from saetrain.runs.train.saving import fold_coders
from saetrain.runs.train.setup import RunContext
from saetrain.settings import DEFAULT_LOSS_TOKENS
from saetrain.training.checkpoint import MAX_CHECKPOINTS
from saetrain.training.steps.base import MicroBatch
from saetrain.training.trainer import SiteBatches, Trainer

TIMED_STEPS = 3
TIMED_TOKENS = 4096
TIMED_SCORING_TOKENS = 512


def report_dry_run(run: RunContext, trainer: Trainer, normalizers: dict[str, Normalizer]) -> None:
    """Print model, SAEs, memory, disk, steps and an estimate of the time, for which a few steps are trained."""
    resolved, widths = run.resolved, run.extractor.capture.widths
    print_rank0(f"model       {run.model.name} on {run.model.device}, {run.model.dtype}")
    print_rank0(f"kernels     {describe_kernels(run)}")
    for name, sae in trainer.saes.items():
        count, config = count_parameters(sae.coder), run.plans[name].config
        print_rank0(
            f"SAE         {name}: {config.architecture}, width {sae.coder.d_in}, {sae.coder.num_latents:,} latents, "
            f"k {config.sae.k}, {count:,} parameters"
        )
    elsewhere = len(run.plans) - len(trainer.saes)
    if elsewhere:
        print_rank0(f"            and {elsewhere} more in other processes")
    optim = run.config.optim
    print_rank0(
        f"lr          {describe_lrs(run.config, trainer)}, {resolved.warmup_steps} warm-up steps, weight decay "
        f"{optim.effective_weight_decay:g}"
    )
    for remark in {describe_lr_risk(run, name, sae.coder) for name, sae in trainer.saes.items()} - {None}:
        print_rank0(f"            {remark}")
    per_process = " per process" if env.world_size() > 1 else ""
    needed = required_memory_bytes(run.config, run.model, run.plans, widths, run.framing.ctx_len, resolved.placement)
    available = format_bytes(available_memory_bytes(run.model.device))
    print_rank0(f"memory      {format_bytes(needed)}{per_process} in addition to the program, {available} available")
    weights = count_sae_parameters(run.plans.values(), widths) * FP32_BYTES
    sae_files = weights * (2 if run.config.output.save_sparsify else 1)
    print_rank0(
        f"disk        {format_bytes(3 * weights)} per checkpoint ({MAX_CHECKPOINTS} are kept), "
        f"{format_bytes(sae_files)} for the trained SAEs"
    )
    if run.config.cache.cache_activations:
        print_rank0(f"cache       {_describe_cache_size(run)}")
    print_rank0(f"steps       {resolved.steps:,} of {resolved.tokens_per_step:,} tokens = {resolved.n_tokens:,} tokens")
    length = "a stream of unknown length" if run.train_tokens is None else f"{run.train_tokens:,} tokens"
    print_rank0(f"text        {length}; {describe_passes(run)}")
    step_s, model_s = time_step(run, trainer, normalizers)
    phases = estimate_phases(run, trainer, normalizers, step_s, model_s)
    for number, (phase, seconds) in enumerate(phases.items()):
        print_rank0(f"{'' if number else 'time':<11} {format_duration(seconds):>7}  {phase}")
    print_rank0(f"{'':<11} {format_duration(sum(phases.values())):>7}  in total, on a machine as busy as now")


def _describe_cache_size(run: RunContext) -> str:
    """Return the space that the activations of all training tokens take, and the limit, as text."""
    text_tokens = run.resolved.n_tokens if run.train_tokens is None else min(run.train_tokens, run.resolved.n_tokens)
    metadata = describe_activations(run.extractor.capture, run.weights_sha256, run.config.base.trust_remote_code)
    settings = run.config.cache
    cache_dir = resolve_cache_dir(settings.cache_dir)
    return (
        f"{format_bytes(text_tokens * metadata.bytes_per_token)} for the activations of {text_tokens:,} tokens, at "
        f"most {format_bytes(parse_size(settings.cache_size))} (--cache_size), in {cache_dir}"
    )


def estimate_phases(
    run: RunContext, trainer: Trainer, normalizers: dict[str, Normalizer], step_s: float, model_s: float
) -> dict[str, float]:
    """Return {phase: seconds}, given the seconds per step and those of the model per token of a rank."""
    config, resolved = run.config, run.resolved
    fill_tokens = 0
    if run.head is None:
        batch_source = build_batch_source(run, normalizers)
        fill_tokens = batch_source.report_fills(lambda tokens, seconds: None)
        batch_source.close()
    rate = f"{resolved.tokens_per_step / step_s:,.0f} tokens/s"
    eval_tokens = min(config.evaluation.eval_tokens, run.held_out.text_tokens)
    score_s, assess_s, whole_model_s = _time_scoring(run, trainer, normalizers)
    phases = {"reading and tokenizing, unless it is cached": run.read_s} if run.read_s else {}
    if fill_tokens:
        phases[f"filling the shuffle buffer with {fill_tokens:,} activations"] = fill_tokens * model_s
    phases |= {
        f"training at {rate}": max(0.0, step_s * resolved.steps - fill_tokens * model_s),
        f"scoring {eval_tokens:,} held-out tokens": eval_tokens * (model_s + score_s),
    }
    if config.assess:
        loss_tokens = config.scoring.loss_tokens
        if loss_tokens is None:
            loss_tokens = DEFAULT_LOSS_TOKENS[run.model.device.type]
        # The model runs once clean, and per SAE with its reconstruction, with zeros and with the mean.
        passes = 1 + 3 * len(run.plans)
        phases["assessing the SAEs next to baselines"] = (
            config.scoring.fit_tokens * model_s
            + eval_tokens * (model_s + assess_s)
            + passes * min(loss_tokens, eval_tokens) * whole_model_s
        )
    row_s = score_s / max(len(trainer.saes), 1)
    return phases | _estimate_features(run, model_s, row_s, whole_model_s)


def _estimate_features(run: RunContext, model_s: float, row_s: float, whole_model_s: float) -> dict[str, float]:
    """Return {phase: seconds} of the collection of features and of the report.

    ``row_s``: seconds per row of a product with the weights of one SAE; ``model_s`` and ``whole_model_s``: seconds per
    token of the model up to the last hookpoint and of the whole model.
    """
    config, phases, n_saes = run.config, {}, len(run.plans)
    widths = run.extractor.capture.widths
    latents = [plan.config.sae.resolve_num_latents(plan.site.sum_widths(widths)[0]) for plan in run.plans.values()]
    if config.collects_features:
        tokens = config.features.feature_tokens
        tokens = min(DEFAULT_FEATURE_TOKENS, run.resolved.n_tokens) if tokens is None else tokens
        tokens = min(tokens, max(run.held_out.text_tokens, run.train_tokens or tokens))
        # The neighbours of a latent take a product of its decoder row with all rows.
        phases[f"collecting features on {tokens:,} tokens"] = (
            tokens * model_s + (n_saes * tokens + sum(latents)) * row_s
        )
        # A latent that does not fire in a batch takes no pass, so this is an upper bound.
        if config.features.ablate_latents:
            chosen = sum(1 + min(config.features.ablate_latents, each) for each in latents)
            ablated = min(tokens, config.features.ablate_tokens or DEFAULT_LOSS_TOKENS[run.model.device.type])
            phases[f"ablating up to {config.features.ablate_latents:,} latents per SAE"] = (
                chosen * ablated * whole_model_s
            )
    if config.assess and config.report:
        phases["writing the report"] = sum(min(each, MAX_SAMPLED_ROWS) for each in latents) * row_s
    return phases


def _time_scoring(run: RunContext, trainer: Trainer, normalizers: dict[str, Normalizer]) -> tuple[float, float, float]:
    """Return seconds per token to score the SAEs, to score them with baselines, and for a pass of the whole model."""
    sequences = run.train_source.read_first_batches(TIMED_SCORING_TOKENS)[:1]
    batches = list(run.extractor.iterate_labelled(sequences))
    n_tokens = sum(len(batch.doc) for batch in batches)
    targets = fold_coders(trainer, normalizers)
    with_baselines = {}
    for name, target in targets.items():
        moments = RunningMoments(len(target.centre), target.centre.device)
        for batch in batches:
            moments.add(target.site.select_xy(batch.values)[1].float())
        l0 = target.coder.expected_l0() or 1.0
        baselines = Baselines.from_moments(moments, target.coder.num_latents, l0, seed=0)
        with_baselines[name] = dataclasses.replace(target, baselines=baselines)
    threshold = run.config.dead.dead_percentage_threshold
    times = []
    for each in (targets, with_baselines):
        start = time.perf_counter()
        evaluate_coders(each, batches, threshold, replicates=run.config.scoring.bootstrap)
        times.append((time.perf_counter() - start) / n_tokens)
    ids, mask = pad_batch(sequences[0], run.model.device)
    start = time.perf_counter()
    with torch.no_grad():
        run.model.module(input_ids=ids, attention_mask=mask, **run.model.forward_kwargs())
    _synchronize_device(run.model.device)
    return times[0], times[1], (time.perf_counter() - start) / n_tokens


def time_step(run: RunContext, trainer: Trainer, normalizers: dict[str, Normalizer]) -> tuple[float, float]:
    """Return (seconds per optimizer step, including the model's; seconds of the model per token)."""
    batches = run.train_source.read_first_batches(max(TIMED_TOKENS, run.extractor.batch_tokens))
    run.extractor.extract_all(batches[:1])
    start = time.perf_counter()
    activations = run.extractor.extract_all(batches)
    model_s = (time.perf_counter() - start) / len(activations)
    if run.head is not None:
        return time_end_to_end_step(run, trainer, normalizers), model_s
    micro_tokens = run.resolved.tokens_per_step // run.config.train.grad_acc_steps
    if not run.resolved.placement.owners:
        micro_tokens //= env.world_size()
    rows = torch.arange(micro_tokens, device=run.model.device) % len(activations)
    values = {name: value[rows] for name, value in activations.values.items()}
    own_sites = dict.fromkeys(sae.site for sae in trainer.saes.values())
    own_tokens = run.resolved.tokens_per_step / env.world_size()

    def build_batches() -> SiteBatches:
        return {site.name: MicroBatch(*site.select_xy(values)) for site in own_sites}

    return model_s * own_tokens + _median_step_s(run, trainer, iter(build_batches, None)), model_s


def time_end_to_end_step(run: RunContext, trainer: Trainer, normalizers: dict[str, Normalizer]) -> float:
    """Return seconds per optimizer step that includes the model."""
    batch_source = build_batch_source(run, normalizers)
    try:
        return _median_step_s(run, trainer, batch_source.iterate_batches())
    finally:
        batch_source.close()


def _median_step_s(run: RunContext, trainer: Trainer, batches: Iterator[SiteBatches]) -> float:
    times = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        trainer.train_step(batches)
        _synchronize_device(run.model.device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _synchronize_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

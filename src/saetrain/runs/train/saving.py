"""Finished SAEs: fold the normalizer into each coder and write its directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from saetrain import distributed
from saetrain.activations.normalize import Normalizer
from saetrain.atomic_io import replace_non_finite
from saetrain.config import write_yaml
from saetrain.evaluation.evaluator import EvalTarget
from saetrain.interop import sparsify
from saetrain.interop.formats import save_sae
from saetrain.interop.metadata import SaeMetadata
from saetrain.logs.console import log_rank0
from saetrain.runs.run_dir import CONFIG_FILE, SAES_DIR
from saetrain.runs.train.gather import RankGather
from saetrain.runs.train.metadata import build_run_metadata, hook_name
from saetrain.runs.train.setup import RunContext, resolve_config
from saetrain.training.trainer import Trainer


def fold_coders(trainer: Trainer, normalizers: Mapping[str, Normalizer]) -> dict[str, EvalTarget]:
    """Return the SAEs of this rank as they would be saved now: each takes raw activations."""
    targets = {}
    for name, sae in trainer.saes.items():
        inputs, outputs = normalizers[sae.site.x_name], normalizers[sae.site.y_name]
        coder = sae.coder.folded(inputs, outputs).for_inference()
        targets[name] = EvalTarget(sae.site, coder, outputs.mean)
    return targets


def _record_end(metadata: SaeMetadata, trainer: Trainer, sae: str) -> SaeMetadata:
    """Return the metadata with how far the SAE was trained."""
    ended = trainer.ended.get(sae)
    steps, diverged_step = (trainer.step, None) if ended is None else (ended.weights_step, ended.spike_step)
    tokens = steps * trainer.tokens_per_step
    return dataclasses.replace(metadata, steps=steps, tokens_seen=tokens, diverged_step=diverged_step)


def save_saes(
    directory: Path,
    context: RunContext,
    trainer: Trainer,
    normalizers: Mapping[str, Normalizer],
    metrics: Mapping[str, dict[str, float]],
    report_write_errors: Callable[[], AbstractContextManager[None]],
) -> None:
    """Write one directory per SAE below ``directory``; rank 0 writes, the other ranks send their weights.

    Each write is done within ``report_write_errors()``.
    """
    run_metadata, rank_gather = build_run_metadata(context, trainer), RankGather(context)
    targets = fold_coders(trainer, normalizers)
    skip_files = () if context.config.output.save_sparsify else (sparsify.WEIGHTS_FILE,)
    weights = {name: target.coder.state_dict() for name, target in targets.items()}
    for name, tensors in rank_gather.gather_tensors(weights, "sending SAEs").items():
        plan = context.plans[name]
        site, config = plan.site, plan.config
        metadata = dataclasses.replace(
            run_metadata.with_site(site, context.extractor.norm_limits),
            hook_name=hook_name(context, site),
            init_seed=plan.seed,
            kernels=context.resolved.kernels[name].kernels,
            compute_dtype=context.resolved.kernels[name].compute_dtype,
            held_out_figures=replace_non_finite(metrics[name]),
        )
        metadata = _record_end(metadata, trainer, name)
        # Rank 0 builds the coders of other ranks too, and replaces their initial weights.
        d_in, d_out = site.sum_widths(context.extractor.capture.widths)
        coder = config.coder_class.build(config.sae, d_in, None if site.is_sae else d_out).for_inference()
        coder.load_state_dict(tensors)
        distributed.record_progress()
        folder, own = directory / SAES_DIR / name, resolve_config(context, name)
        with report_write_errors():
            folder.mkdir(parents=True, exist_ok=True)
            # A run with these settings has another default name, so that it does not meet this one's folder.
            write_yaml(
                folder / CONFIG_FILE, dataclasses.replace(own, output=dataclasses.replace(own.output, run_name=None))
            )
            skipped = save_sae(folder, coder, metadata, skip_files)
        for format_name, reason in skipped.items():
            log_rank0(f"{name}: not saved for {format_name}: {reason}; saetrain.load reads it")

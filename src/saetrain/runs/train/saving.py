"""Finished SAEs: fold the normalizer into each coder and write its directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from saetrain.activations.normalize import Normalizer
from saetrain.atomic_io import replace_non_finite
from saetrain.coders.folding import fold_normalizer
from saetrain.coders.topk import TopK
from saetrain.evaluation.evaluator import EvalTarget
from saetrain.interop.saetrain_format import save_sae
from saetrain.runs.run_dir import SAES_DIR
from saetrain.runs.train.gather import RankGather
from saetrain.runs.train.metadata import build_run_metadata, hook_name
from saetrain.runs.train.setup import RunContext
from saetrain.training.trainer import Trainer


def fold_coders(trainer: Trainer, normalizers: Mapping[str, Normalizer]) -> dict[str, EvalTarget]:
    """Return the SAEs of this rank as they would be saved now: each takes raw activations."""
    targets = {}
    for name, sae in trainer.saes.items():
        inputs = normalizers[sae.hookpoint]
        coder = fold_normalizer(sae.coder, inputs.mean, inputs.scale, inputs.axes)
        targets[name] = EvalTarget(sae.hookpoint, sae.hookpoint, coder, inputs.mean)
    return targets


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
    weights = {name: dict(target.coder.named_parameters()) for name, target in targets.items()}
    for name, tensors in rank_gather.gather_tensors(weights, "sending SAEs").items():
        hookpoint, seed = rank_gather.names[name]
        metadata = {
            **run_metadata,
            "hookpoint": hookpoint,
            "hook_name": hook_name(context, hookpoint),
            "init_seed": seed,
            "norm_limit": context.extractor.norm_limits.get(hookpoint),
            "held_out_figures": replace_non_finite(metrics[name]),
        }
        coder = TopK.from_weights(tensors, context.config.sae.k)
        with report_write_errors():
            save_sae(directory / SAES_DIR / name, coder, metadata, context.config.output.save_sparsify)

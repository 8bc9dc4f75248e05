"""``saetrain evaluate PATH``: metrics on held-out text next to their baselines, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm

from saetrain.activations.extract import LabelledActivations, TokenClass
from saetrain.activations.lm_batches import LMBatchBuilder
from saetrain.activations.model import resolve_device
from saetrain.config import EvaluateConfig
from saetrain.data.sharded import build_token_policy
from saetrain.errors import SaetrainError, is_out_of_memory
from saetrain.evaluation.baselines import Baselines, RunningMoments
from saetrain.evaluation.evaluator import CHUNK_TOKENS, EvalTarget, SaeScores, evaluate_coders
from saetrain.evaluation.loss_recovered import evaluate_losses
from saetrain.runs.evaluate.load_saes import load_saes
from saetrain.runs.evaluate.report import Assessment, TextScores, report_assessment
from saetrain.runs.evaluate.setup import EvalContext, build_eval_context
from saetrain.runs.evaluate.texts import EvalText, open_eval_texts
from saetrain.runs.train.setup import quiet_libraries


def evaluate_saes(config: EvaluateConfig, max_eval_tokens: int | None = None) -> Assessment:
    """Score the SAEs, print the tables and write the files; SaetrainError for errors that the user can fix.

    ``max_eval_tokens``: tokens per data set if --eval_tokens is not given; the default is that of the SAE's run.
    """
    torch.set_flush_denormal(True)
    quiet_libraries()
    loaded = load_saes(config.path)
    try:
        context = build_eval_context(config, loaded, max_eval_tokens)
        texts, fit_batches = open_eval_texts(context)
        targets = fit_targets(context, fit_batches)
        scores = [score_text(context, text, targets) for text in texts]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tokens = config.base.resolve_batch_tokens(resolve_device(config.base.device))
        raise SaetrainError(
            f"out of memory while scoring: lower --model_batch_tokens from {tokens} to {max(1, tokens // 2)}"
        ) from error
    assessment = Assessment.from_scores(context, scores)
    report_assessment(assessment)
    return assessment


@torch.no_grad()
def fit_targets(context: EvalContext, batches: Iterable[LabelledActivations]) -> dict[str, EvalTarget]:
    """Return {SAE: evaluation target}, with baselines that are fitted on activations of training tokens."""
    device, seed = context.head.base.device, context.config.scoring.eval_seed
    coders = {name: found.coder.to(device) for name, found in context.loaded.saes.items()}
    moments = {name: RunningMoments(width, device) for name, width in context.extractor.capture.widths.items()}
    n_active = {name: 0 for name, coder in coders.items() if coder.expected_l0() is None}
    for batch in batches:
        rows = torch.from_numpy(np.flatnonzero(batch.token_class == TokenClass.KEPT)).to(device)
        kept = {hookpoint: value[rows].float() for hookpoint, value in batch.values.items()}
        for hookpoint, x_ND in kept.items():
            moments[hookpoint].add(x_ND)
        for name in n_active:
            for x_ND in kept[context.hookpoints[name]].split(CHUNK_TOKENS):
                n_active[name] += int(coders[name].encode(x_ND).l0_per_token().sum())
    targets = {}
    for name, coder in coders.items():
        hookpoint, l0 = context.hookpoints[name], coder.expected_l0()
        moment = moments[hookpoint]
        l0 = l0 if l0 is not None else n_active[name] / max(moment.n_tokens, 1)
        baselines = Baselines.from_moments(moment, coder.num_latents, l0, seed)
        targets[name] = EvalTarget(hookpoint, hookpoint, coder, baselines.mean, baselines)
    return targets


def score_text(context: EvalContext, text: EvalText, targets: dict[str, EvalTarget]) -> TextScores:
    """Return all metrics of all SAEs on one text."""
    scoring, extractor = context.config.scoring, context.extractor
    with _progress_bar(text, text.indices, "activations") as bar:
        batches = (batch for group in text.iter_groups(text.indices) for batch in extractor.iterate_labelled(group))
        scores = evaluate_coders(
            targets,
            batches,
            context.dead_threshold,
            replicates=scoring.bootstrap,
            seed=scoring.eval_seed,
            on_progress=bar.update,
        )
    if text.loss_sequences:
        _add_loss_metrics(context, text, targets, scores)
    return TextScores(text.name, text.in_sample, text.description, scores, text.loss_sequences)


def _add_loss_metrics(
    context: EvalContext, text: EvalText, targets: dict[str, EvalTarget], scores: dict[str, SaeScores]
) -> None:
    """Add the metrics of the model's loss to ``scores``."""
    scoring, extractor = context.config.scoring, context.extractor
    keep, limits = extractor.keep, extractor.norm_limits
    if scoring.splice_positions == "all":
        keep, limits = build_token_policy(exclude_special=False, exclude_first=False), {}
    builder = LMBatchBuilder(context.head, keep, context.tokenizer.mask_token_id)
    indices = text.indices[: text.loss_sequences]
    with _progress_bar(text, indices, "model loss") as bar:
        batches = (
            batch
            for group in text.iter_groups(indices)
            for batch in builder.iterate_batches(group, extractor.batch_tokens, scoring.eval_seed)
        )
        losses = evaluate_losses(
            targets, context.head, batches, limits, scoring.bootstrap, scoring.eval_seed, bar.update
        )
    for name, metrics in losses.items():
        scores[name].metrics.update(metrics)


def _progress_bar(text: EvalText, indices: np.ndarray, what: str) -> tqdm[NoReturn]:
    """Return a progress bar over the tokens of the sequences at ``indices``."""
    n_tokens = sum(len(text.sequences[int(number)]) for number in indices)
    return tqdm(total=n_tokens, unit="tok", desc=f"{Path(text.name).name}: {what}", disable=None)

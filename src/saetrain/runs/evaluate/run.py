"""``saetrain evaluate PATH``: metrics on held-out text next to their baselines, and a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from saetrain.activations.extract import LabelledActivations, TokenClass
from saetrain.activations.lm_batches import LMBatchBuilder
from saetrain.activations.model import resolve_device
from saetrain.config import EvaluateConfig
from saetrain.data.sharded import build_token_policy
from saetrain.errors import SaetrainError, is_out_of_memory
from saetrain.evaluation.baselines import PCA, RandomDecoder, RunningMoments
from saetrain.evaluation.evaluator import EvalTarget
from saetrain.evaluation.score import Baselines, SaeScores, score_activations, score_losses
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
        texts, fit = open_eval_texts(context)
        baselines = fit_baselines(context, fit)
        scores = [score_text(context, text, baselines) for text in texts]
        assessment = Assessment.from_scores(config, loaded, context.head, scores, context.dead_threshold)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tokens = config.base.resolve_batch_tokens(resolve_device(config.base.device))
        raise SaetrainError(
            f"out of memory while scoring: lower --model_batch_tokens from {tokens} to {max(1, tokens // 2)}"
        ) from error
    report_assessment(assessment)
    return assessment


def fit_baselines(context: EvalContext, batches: Iterator[LabelledActivations]) -> dict[str, Baselines]:
    """Return {SAE: baselines}, fitted on activations of training tokens."""
    device = context.head.base.device
    moments = {name: RunningMoments(width, device) for name, width in context.extractor.capture.widths.items()}
    for batch in batches:
        kept = torch.from_numpy(np.flatnonzero(batch.token_class == TokenClass.KEPT)).to(device)
        for name, value in batch.values.items():
            moments[name].add(value[kept].float())
    out = {}
    for sae, found in context.loaded.saes.items():
        found.coder.to(device)
        moment = moments[context.hookpoints[sae]]
        mean, k = moment.compute_mean(), found.coder.k
        random = RandomDecoder.from_seed(mean, found.coder.num_latents, k, context.config.scoring.eval_seed)
        out[sae] = Baselines(mean, PCA(mean, moment.principal_directions(k)), random)
    return out


def score_text(context: EvalContext, text: EvalText, baselines: dict[str, Baselines]) -> TextScores:
    """Return all metrics of all SAEs on one text."""
    targets = {
        name: EvalTarget(context.hookpoints[name], found.coder, baselines[name].mean)
        for name, found in context.loaded.saes.items()
    }
    n_tokens = sum(len(text.sequences[int(number)]) for number in text.indices)
    with tqdm(total=n_tokens, unit="tok", desc=f"{Path(text.name).name}: activations", disable=None) as bar:
        batches = (
            batch for group in text.iter_groups(text.indices) for batch in context.extractor.iterate_labelled(group)
        )
        scores = score_activations(
            targets, baselines, batches, context.dead_threshold, context.config.scoring, bar.update
        )
    _add_loss_metrics(context, text, targets, baselines, scores)
    return TextScores(text.name, text.in_sample, text.description, scores, text.loss_sequences)


def _add_loss_metrics(
    context: EvalContext,
    text: EvalText,
    targets: dict[str, EvalTarget],
    baselines: dict[str, Baselines],
    scores: dict[str, SaeScores],
) -> None:
    """Add the metrics of the model's loss to ``scores``."""
    if not text.loss_sequences:
        return
    scoring, extractor = context.config.scoring, context.extractor
    keep, limits = extractor.keep, extractor.norm_limits
    if scoring.splice_positions == "all":
        keep, limits = build_token_policy(exclude_special=False, exclude_first=False), {}
    builder = LMBatchBuilder(context.head, keep, context.tokenizer.mask_token_id)
    indices = text.indices[: text.loss_sequences]
    n_tokens = sum(len(text.sequences[int(number)]) for number in indices)
    with tqdm(total=n_tokens, unit="tok", desc=f"{Path(text.name).name}: model loss", disable=None) as bar:
        batches = (
            batch
            for group in text.iter_groups(indices)
            for batch in builder.iterate_batches(group, extractor.batch_tokens, scoring.eval_seed)
        )
        losses = score_losses(targets, baselines, context.head, batches, limits, scoring, bar.update)
    for name, metrics in losses.items():
        scores[name].metrics.update(metrics)

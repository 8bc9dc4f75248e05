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
from saetrain.activations.model import explain_out_of_memory
from saetrain.config import EvaluateConfig
from saetrain.data.sharded import build_token_policy
from saetrain.errors import SaetrainError
from saetrain.evaluation.baselines import Baselines, RunningMoments
from saetrain.evaluation.evaluator import CHUNK_TOKENS, EvalTarget, SaeScores, evaluate_coders
from saetrain.evaluation.frequency import TokenBins
from saetrain.evaluation.loss_recovered import evaluate_losses
from saetrain.logs.console import open_bar
from saetrain.runs.evaluate.load_saes import load_saes
from saetrain.runs.evaluate.report import Assessment, TextScores, report_assessment
from saetrain.runs.evaluate.setup import EvalContext, build_eval_context
from saetrain.runs.evaluate.texts import EvalText, open_eval_texts
from saetrain.runs.share.card import write_sae_cards
from saetrain.runs.train.setup import quiet_libraries


def evaluate_saes(config: EvaluateConfig, max_eval_tokens: int | None = None) -> Assessment:
    """Score the SAEs, print the tables and write the files; SaetrainError for errors that the user can fix.

    ``max_eval_tokens``: tokens per data set if --eval_tokens is not given; the default is that of the SAE's run.
    """
    torch.set_flush_denormal(True)
    quiet_libraries()
    loaded = load_saes(config.path)
    if config.out is None and not Path(config.path).exists():
        raise SaetrainError(f"--out is missing: {config.path} is on the hub, so name a folder for the results")
    with explain_out_of_memory(config.base, "out of memory while scoring"):
        context = build_eval_context(config, loaded, max_eval_tokens)
        texts, fit_batches = open_eval_texts(context)
        targets = fit_targets(context, fit_batches)
        scores = [score_text(context, text, targets) for text in texts]
    assessment = Assessment.from_scores(context, scores)
    report_assessment(assessment)
    if config.out is None and loaded.run_dir is not None:
        write_sae_cards(loaded.run_dir, [sae.folder.resolve() for sae in loaded.saes.values()])
    return assessment


@torch.no_grad()
def fit_targets(context: EvalContext, batches: Iterable[LabelledActivations]) -> dict[str, EvalTarget]:
    """Return {SAE: evaluation target}, with baselines that are fitted on activations of training tokens."""
    device, seed = context.head.base.device, context.config.scoring.eval_seed
    coders = {name: found.coder.to(device) for name, found in context.loaded.saes.items()}
    outputs = {site.y_name: site for site in context.sites.values()}
    widths = context.extractor.capture.widths
    moments = {name: RunningMoments(site.sum_widths(widths)[1], device) for name, site in outputs.items()}
    n_active = {name: 0 for name, coder in coders.items() if coder.expected_l0() is None}
    with open_bar("fitting the baselines", context.config.scoring.fit_tokens) as bar:
        for batch in batches:
            rows = torch.from_numpy(np.flatnonzero(batch.token_class == TokenClass.KEPT)).to(device)
            kept = {hookpoint: value[rows].float() for hookpoint, value in batch.values.items()}
            for name, site in outputs.items():
                moments[name].add(site.select_xy(kept)[1])
            for name in n_active:
                for x_ND in context.sites[name].select_xy(kept)[0].split(CHUNK_TOKENS):
                    n_active[name] += int(coders[name].encode(x_ND).l0_per_token().sum())
            bar.update(len(rows))
    targets = {}
    for name, coder in coders.items():
        site, l0 = context.sites[name], coder.expected_l0()
        moment = moments[site.y_name]
        l0 = l0 if l0 is not None else n_active[name] / max(moment.n_tokens, 1)
        baselines = Baselines.from_moments(moment, coder.num_latents, l0, seed)
        targets[name] = EvalTarget(site, coder, baselines.mean, baselines)
    return targets


def score_text(context: EvalContext, text: EvalText, targets: dict[str, EvalTarget]) -> TextScores:
    """Return all metrics of all SAEs on one text."""
    scoring, extractor = context.config.scoring, context.extractor
    token_bins = TokenBins.from_ids(text.sequences[int(number)].ids for number in text.indices)
    with _open_text_bar(text, text.indices, "assessing") as bar:
        batches = extractor.iterate_labelled(text.sequences.iterate_batches(text.indices, extractor.batch_tokens))
        scores = evaluate_coders(
            targets,
            batches,
            context.dead_threshold,
            replicates=scoring.bootstrap,
            seed=scoring.eval_seed,
            token_bins=token_bins,
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
    with _open_text_bar(text, indices, "model loss on") as bar:
        sequences = text.sequences.iterate_batches(indices, builder.limit_batch_tokens(extractor.batch_tokens))
        batches = builder.iterate_batches(sequences, scoring.eval_seed)
        losses = evaluate_losses(
            targets, context.head, batches, limits, scoring.bootstrap, scoring.eval_seed, bar.update
        )
    for name, metrics in losses.items():
        scores[name].metrics.update(metrics)


def _open_text_bar(text: EvalText, indices: np.ndarray, what: str) -> tqdm[NoReturn]:
    """Return a progress bar over the tokens of the sequences at ``indices``."""
    return open_bar(f"{what} {Path(text.name).name}", sum(len(text.sequences[int(number)]) for number in indices))

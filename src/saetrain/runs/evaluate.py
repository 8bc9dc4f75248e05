"""``saetrain evaluate PATH``: figures on held-out text beside their nulls, and a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from saetrain.activations.model import resolve_device
from saetrain.activations.read import LabelledActivations, TokenClass
from saetrain.config import EvaluateConfig
from saetrain.errors import SaetrainError, is_out_of_memory
from saetrain.evaluation.heldout import EvalTarget
from saetrain.evaluation.nulls import PCA, RandomDecoder, RunningMoments
from saetrain.evaluation.recovered import SplicePolicy, keep_all_tokens
from saetrain.evaluation.score import Baselines, SaeScores, score_activations, score_losses
from saetrain.runs.assessment import Assessment, TextScores, report
from saetrain.runs.locate import Located, locate
from saetrain.runs.match import Setting, prepare, run_config
from saetrain.runs.prepare import quiet_libraries
from saetrain.runs.scored import Scored, open_texts

THRESHOLD = 0.0005


def evaluate(config: EvaluateConfig, most: int | None = None) -> Assessment:
    """Score, print and write; SaetrainError for what the user can mend.

    ``most``: tokens of each data set at the most, where --eval_tokens leaves them open; else as the SAE's run took.
    """
    torch.set_flush_denormal(True)
    quiet_libraries()
    located = locate(config.path)
    try:
        setting = dataclasses.replace(prepare(config, located), most=most or located.says("eval_tokens"))
        texts, fit = open_texts(setting)
        nulls = fit_nulls(setting, fit)
        scores = [score(setting, text, nulls) for text in texts]
        assessment = Assessment.of(config, located, setting.head, scores, threshold(config, located))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tokens = config.base.resolve_batch_tokens(resolve_device(config.base.device))
        raise SaetrainError(
            f"out of memory while scoring: lower --model_batch_tokens from {tokens} to {max(1, tokens // 2)}"
        ) from error
    report(assessment)
    return assessment


def threshold(config: EvaluateConfig, located: Located) -> float:
    """The rate below which a latent is dead."""
    if config.dead_percentage_threshold is not None:
        return config.dead_percentage_threshold
    return run_config(located).dead.dead_percentage_threshold if located.run is not None else THRESHOLD


def fit_nulls(setting: Setting, batches: Iterator[LabelledActivations]) -> dict[str, Baselines]:
    """{SAE: what it is held against}, from activations of training tokens."""
    device = setting.head.base.device
    moments = {name: RunningMoments(width, device) for name, width in setting.reader.capture.widths.items()}
    for batch in batches:
        kept = torch.from_numpy(np.flatnonzero(batch.token_class == TokenClass.KEPT)).to(device)
        for name, value in batch.values.items():
            moments[name].add(value[kept].float())
    out = {}
    for sae, found in setting.located.saes.items():
        found.coder.to(device)
        moment = moments[setting.hookpoints[sae]]
        mean, k = moment.compute_mean(), found.coder.k
        random = RandomDecoder.from_seed(mean, found.coder.num_latents, k, setting.config.scoring.eval_seed)
        out[sae] = Baselines(mean, PCA(mean, moment.principal_directions(k)), random)
    return out


def score(setting: Setting, text: Scored, nulls: dict[str, Baselines]) -> TextScores:
    """All figures on one text."""
    subjects = {
        name: EvalTarget(setting.hookpoints[name], found.coder, nulls[name].mean)
        for name, found in setting.located.saes.items()
    }
    total = sum(len(text.sequences[int(number)]) for number in text.numbers)
    with tqdm(total=total, unit="tok", desc=f"{Path(text.name).name}: activations", disable=None) as bar:
        batches = (batch for group in text.groups(text.numbers) for batch in setting.reader.iterate_labelled(group))
        dead = threshold(setting.config, setting.located)
        scores = score_activations(subjects, nulls, batches, dead, setting.config.scoring, bar.update)
    _add_losses(setting, text, subjects, nulls, scores)
    return TextScores(text.name, text.in_sample, text.what, scores, text.loss_sequences)


def _add_losses(
    setting: Setting,
    text: Scored,
    subjects: dict[str, EvalTarget],
    nulls: dict[str, Baselines],
    scores: dict[str, SaeScores],
) -> None:
    """Add the figures of the model's own loss to ``scores``."""
    if not text.loss_sequences:
        return
    numbers = text.numbers[: text.loss_sequences]
    everywhere = setting.config.scoring.splice_positions == "all"
    limits = {} if everywhere else setting.reader.norm_limits
    keep = keep_all_tokens if everywhere else setting.reader.keep
    policies = {
        hookpoint: SplicePolicy(keep, limits.get(hookpoint, float("inf"))) for hookpoint in setting.hookpoints.values()
    }
    total = sum(len(text.sequences[int(number)]) for number in numbers)
    with tqdm(total=total, unit="tok", desc=f"{Path(text.name).name}: model loss", disable=None) as bar:
        losses = score_losses(
            subjects,
            nulls,
            setting.head,
            text.groups(numbers),
            policies,
            setting.tokenizer.mask_token_id,
            setting.reader.batch_tokens,
            setting.config.scoring,
            bar.update,
        )
    for name, figures in losses.items():
        scores[name].metrics.update(figures)

"""Metrics of several SAEs on held-out text, each next to its baselines and with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.extract import LabelledActivations, TokenClass
from saetrain.activations.lm_batches import LMBatch
from saetrain.activations.lm_head import LMHeadModel
from saetrain.coders.base import SparseCoder
from saetrain.errors import SaetrainError
from saetrain.evaluation import loss_recovered
from saetrain.evaluation.baselines import PCA, RandomDecoder
from saetrain.evaluation.bootstrap import UNBOUNDED, DocumentSums, Estimate, Formula
from saetrain.evaluation.evaluator import CHUNK_TOKENS, EvalTarget
from saetrain.evaluation.geometry import geometry_metrics
from saetrain.evaluation.loss_recovered import LossScorer, model_outputs
from saetrain.evaluation.reconstruction import ReconstructionSums
from saetrain.evaluation.sparsity import SparsitySums
from saetrain.types import shown_default

RANDOM_DECODER, PCA_RECONSTRUCTION, MEAN_RECONSTRUCTION, RANDOM_DIRECTIONS = (
    "random_decoder",
    "pca",
    "mean",
    "random_directions",
)
MAX_SEED = (1 << 32) - 1
"""Largest seed; up to here all seeds give different document weights."""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Scoring: numbers of tokens, and intervals."""

    loss_tokens: Annotated[int | None, shown_default("8192 on a CPU, 131072 on a GPU", "INT")] = None
    """Held-out tokens per data set on which the model's loss is measured with the SAE spliced in (0: none)."""
    fit_tokens: int = 20_000
    """Training tokens on which the baselines (PCA, mean) are fitted."""
    bootstrap: int = 200
    """Resamplings of the documents for each interval (0: no intervals)."""
    splice_positions: Literal["kept", "all"] = "kept"
    """Positions at which the model's activation is replaced: those that the token policy keeps, or all."""
    eval_seed: int = 0
    """Seed of the intervals, of the random decoder, and of the tokens that a masked model predicts."""

    def __post_init__(self) -> None:
        for name, least in (("loss_tokens", 0), ("fit_tokens", 2), ("bootstrap", 0), ("eval_seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SaetrainError(f"--{name} {value}: must be at least {least}")
        if self.eval_seed > MAX_SEED:
            raise SaetrainError(f"--eval_seed {self.eval_seed}: must be at most {MAX_SEED}")
        if self.bootstrap == 1:
            raise SaetrainError("--bootstrap 1: one resampling gives no interval; give 0 or at least 2")


@dataclass(frozen=True)
class Baselines:
    """The baselines of an SAE; ``mean`` (D,) is the mean of the training tokens."""

    mean: Tensor
    pca: PCA
    random_decoder: RandomDecoder


@dataclass(frozen=True)
class MetricResult:
    """A metric: its estimate, the number of tokens (or latents, or sequences) measured, its baselines, and a flag."""

    estimate: Estimate
    count: int
    baselines: Mapping[str, Estimate] = field(default_factory=dict)
    flag: str = ""

    def as_json(self, formula: str) -> dict[str, Any]:
        """Return the metric as it is stored; ``formula`` names its entry in docs/metrics.md."""
        return {
            **self.estimate.as_json(),
            "count": self.count,
            "formula": formula,
            "nulls": {name: estimate.as_json() for name, estimate in self.baselines.items()},
            **({"flag": self.flag} if self.flag else {}),
        }


@dataclass
class SaeScores:
    """Results of one SAE on one text.

    ``metrics_by_class`` {class of positions: reconstruction metrics and tokens}; ``density_histogram`` as of
    :meth:`SparsitySums.density_histogram`; ``l0_percentiles`` the 5th, 50th and 95th over tokens.
    """

    metrics: dict[str, MetricResult]
    metrics_by_class: dict[str, dict[str, float]]
    density_histogram: dict[str, Any]
    l0_percentiles: tuple[int, int, int]
    n_documents: int


class _ActivationScorer:
    """Sums over the activations of one SAE, and the same sums for its baselines."""

    def __init__(
        self, target: EvalTarget, baselines: Baselines, dead_threshold: float, settings: ScoreSettings
    ) -> None:
        self.target, self.baselines = target, baselines
        device, bootstrap_args = target.centre.device, (settings.bootstrap, settings.eval_seed)
        self.sums_by_class = {
            token_class: ReconstructionSums(target.centre, *(bootstrap_args if token_class is TokenClass.KEPT else ()))
            for token_class in TokenClass
        }
        self.baseline_sums = {
            name: ReconstructionSums(target.centre, *bootstrap_args)
            for name in (RANDOM_DECODER, PCA_RECONSTRUCTION, MEAN_RECONSTRUCTION)
        }
        num_latents = target.coder.num_latents
        self.sparsity_sums = SparsitySums(num_latents, dead_threshold, device, *bootstrap_args)
        self.random_sparsity_sums = SparsitySums(num_latents, dead_threshold, device, *bootstrap_args)

    def add(self, x_ND: Tensor, docs: np.ndarray, token_classes: np.ndarray) -> None:
        coder, baselines = self.target.coder, self.baselines
        for start in range(0, len(docs), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            x, doc, token_class = x_ND[chunk].float(), docs[chunk], token_classes[chunk]
            codes = coder.encode(x)
            x_hat = coder.decode(codes)
            rows_by_class = {
                kind: torch.from_numpy(np.flatnonzero(token_class == kind)).to(x.device) for kind in TokenClass
            }
            for kind, sums in self.sums_by_class.items():
                sums.add(x[rows_by_class[kind]], x_hat[rows_by_class[kind]], doc[token_class == kind])
            kept, kept_docs = x[rows_by_class[TokenClass.KEPT]], doc[token_class == TokenClass.KEPT]
            self.sparsity_sums.add(codes.select_tokens(rows_by_class[TokenClass.KEPT]), kept_docs)
            random_codes = baselines.random_decoder.encode(kept)
            self.random_sparsity_sums.add(random_codes, kept_docs)
            self.baseline_sums[RANDOM_DECODER].add(kept, baselines.random_decoder.decode(random_codes, kept), kept_docs)
            self.baseline_sums[PCA_RECONSTRUCTION].add(kept, baselines.pca(kept), kept_docs)
            self.baseline_sums[MEAN_RECONSTRUCTION].add(kept, baselines.mean.expand_as(kept), kept_docs)

    def collect_metrics(self) -> dict[str, MetricResult]:
        """Return the metrics on the kept tokens, each with its baselines."""
        out: dict[str, MetricResult] = {}
        kept_sums = self.sums_by_class[TokenClass.KEPT]
        baseline_estimates = {name: sums.metric_estimates() for name, sums in self.baseline_sums.items()}
        for name, estimate in kept_sums.metric_estimates().items():
            out[name] = MetricResult(
                estimate,
                kept_sums.n_tokens,
                {baseline: estimates[name] for baseline, estimates in baseline_estimates.items()},
            )
        random_estimates = self.random_sparsity_sums.metric_estimates()
        for name, estimate in self.sparsity_sums.metric_estimates().items():
            out[name] = MetricResult(estimate, self.sparsity_sums.n_tokens, {RANDOM_DECODER: random_estimates[name]})
        return out

    def metrics_by_class(self) -> dict[str, dict[str, float]]:
        """Return the reconstruction metrics per class of positions, and over all positions."""
        sums_by_name = {
            token_class.name.lower(): sums for token_class, sums in self.sums_by_class.items() if sums.n_tokens
        }
        first, *rest = self.sums_by_class.values()
        sums_by_name["all"] = first.merged_with(rest)
        return {name: {"tokens": sums.n_tokens, **sums.metric_values()} for name, sums in sums_by_name.items()}


@torch.no_grad()
def score_activations(
    targets: Mapping[str, EvalTarget],
    baselines: Mapping[str, Baselines],
    batches: Iterable[LabelledActivations],
    dead_threshold: float,
    settings: ScoreSettings,
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, SaeScores]:
    """Return {SAE: scores} over all ``batches`` of activations.

    A latent that fires on a smaller share of the tokens than ``dead_threshold`` counts as dead. ``on_progress`` is
    called with the number of tokens after each batch.
    """
    scorers = {
        name: _ActivationScorer(target, baselines[name], dead_threshold, settings) for name, target in targets.items()
    }
    documents: set[int] = set()
    for batch in batches:
        documents.update(np.unique(batch.doc).tolist())
        for scorer in scorers.values():
            scorer.add(batch.values[scorer.target.hookpoint], batch.doc, batch.token_class)
        on_progress(len(batch.doc))
    return {
        name: SaeScores(
            {**scorer.collect_metrics(), **_geometry_with_baselines(scorer.target.coder)},
            scorer.metrics_by_class(),
            scorer.sparsity_sums.density_histogram(),
            scorer.sparsity_sums.l0_percentiles(),
            len(documents),
        )
        for name, scorer in scorers.items()
    }


def _geometry_with_baselines(coder: SparseCoder) -> dict[str, MetricResult]:
    metrics = geometry_metrics(coder.W_enc, coder.W_dec)
    return {
        name: MetricResult(Estimate(value), coder.num_latents, {RANDOM_DIRECTIONS: Estimate(metrics[f"{name}_random"])})
        for name, value in metrics.items()
        if not name.endswith("_random")
    }


def score_losses(
    targets: Mapping[str, EvalTarget],
    baselines: Mapping[str, Baselines],
    head: LMHeadModel,
    batches: Iterable[LMBatch],
    norm_limits: Mapping[str, float],
    settings: ScoreSettings,
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, dict[str, MetricResult]]:
    """Return {SAE: metrics} of the model's loss with each SAE spliced in, over all ``batches``.

    Args:
        targets: the SAEs by name.
        baselines: the baselines of each SAE.
        head: the model.
        batches: at their kept positions the activation is replaced.
        norm_limits: {hookpoint: largest norm of an activation that is replaced}; hookpoints may be missing.
        settings: seed and number of replicates.
        on_progress: called with the number of tokens after each batch.
    """
    scorers = {
        name: LossScorer(
            head,
            target.hookpoint,
            _build_variants(target.coder, baselines[name]),
            norm_limits.get(target.hookpoint, float("inf")),
            settings.bootstrap,
            settings.eval_seed,
        )
        for name, target in targets.items()
    }
    for lm_batch in batches:
        with torch.no_grad():
            clean_outputs = model_outputs(head, lm_batch)
        for scorer in scorers.values():
            scorer.add(lm_batch, clean_outputs)
        on_progress(int(lm_batch.attention_mask.sum()))
    return {name: _loss_metrics(head, scorer) for name, scorer in scorers.items()}


def _build_variants(coder: SparseCoder, baselines: Baselines) -> dict[str, loss_recovered.ReplaceFn]:
    return {
        loss_recovered.SAE_VARIANT: lambda x: coder.decode(coder.encode(x)),
        loss_recovered.ZERO_VARIANT: torch.zeros_like,
        loss_recovered.MEAN_VARIANT: baselines.mean.expand_as,
        RANDOM_DECODER: baselines.random_decoder,
        PCA_RECONSTRUCTION: baselines.pca,
    }


def _loss_metrics(head: LMHeadModel, scorer: LossScorer) -> dict[str, MetricResult]:
    if not scorer.n_tokens:
        return {}
    if head.kind == "none":
        hidden_metrics = _metrics_with_baselines(scorer.token_sums, loss_recovered.hidden_formulas, scorer.n_tokens)
        n_sequences = int(scorer.sequence_sums.full_sums["sequences"])
        return {
            **hidden_metrics,
            **_metrics_with_baselines(scorer.sequence_sums, loss_recovered.pooled_formulas, n_sequences),
        }
    model_metrics = {
        name: MetricResult(
            scorer.token_sums.estimate_metric(formula, loss_recovered.METRIC_RANGES[name]), scorer.n_tokens
        )
        for name, formula in loss_recovered.MODEL_FORMULAS.items()
    }
    return {
        **model_metrics,
        **_metrics_with_baselines(scorer.token_sums, loss_recovered.loss_formulas, scorer.n_tokens),
    }


def _metrics_with_baselines(
    sums: DocumentSums, formulas: Callable[[str], dict[str, Formula]], count: int
) -> dict[str, MetricResult]:
    """Return each metric of the SAE with its baselines; that of the mean is the ablation by the mean."""
    baseline_formulas = {
        name: formulas(name) for name in (RANDOM_DECODER, PCA_RECONSTRUCTION, loss_recovered.MEAN_VARIANT)
    }
    out = {}
    for name, formula in formulas(loss_recovered.SAE_VARIANT).items():
        value_range = loss_recovered.METRIC_RANGES.get(name, UNBOUNDED)
        flag = "small denominator" if loss_recovered.has_small_denominator(sums.full_sums, name) else ""
        baselines = {
            baseline: sums.estimate_metric(formulas_of_baseline[name], value_range)
            for baseline, formulas_of_baseline in baseline_formulas.items()
        }
        out[name] = MetricResult(sums.estimate_metric(formula, value_range), count, baselines, flag)
    return out

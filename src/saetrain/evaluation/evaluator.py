"""Metrics of several coders on activations, in one pass: quick, or with intervals and next to their baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.extract import LabelledActivations, TokenClass
from saetrain.coders.base import SparseCoder
from saetrain.distributed import record_progress
from saetrain.errors import SaetrainError
from saetrain.evaluation.baselines import MEAN_RECONSTRUCTION, PCA_RECONSTRUCTION, RANDOM_DECODER, Baselines
from saetrain.evaluation.bootstrap import Estimate
from saetrain.evaluation.frequency import FrequencySums, TokenBins
from saetrain.evaluation.geometry import geometry_metrics
from saetrain.evaluation.reconstruction import ReconstructionSums
from saetrain.evaluation.sparsity import SparsitySums
from saetrain.settings import DEFAULT_LOSS_TOKENS, Range, Seed, Settings, Total, TotalOrZero
from saetrain.types import Site, shown_default

CHUNK_TOKENS = 1024
"""Tokens encoded at once; bounds the memory of the pre-activations (N, F)."""
MAX_FIT_TOKENS, MAX_BOOTSTRAP = 10**9, 100_000
RANDOM_DIRECTIONS = "random_directions"
"""Name of the baseline of decoder geometry."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings(Settings):
    """Evaluation on held-out text during training."""

    eval_every: TotalOrZero = 1000
    """Optimizer steps between evaluations on held-out text. A run always evaluates at its end (0: only there)."""
    eval_tokens: Total = 20_000
    """Held-out tokens per evaluation."""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(Settings):
    """Scoring: numbers of tokens, and intervals."""

    loss_tokens: Annotated[
        TotalOrZero | None,
        shown_default(f"{DEFAULT_LOSS_TOKENS['cpu']} on a CPU, {DEFAULT_LOSS_TOKENS['cuda']} on a GPU", "INT"),
    ] = None
    """Held-out tokens per data set on which the model's loss is measured with the SAE spliced in (0: none)."""
    fit_tokens: Annotated[int, Range(2, MAX_FIT_TOKENS)] = 20_000
    """Training tokens on which the baselines (PCA, mean) are fitted."""
    bootstrap: Annotated[int, Range(0, MAX_BOOTSTRAP)] = 200
    """Resamplings of the documents for each interval (0: no intervals)."""
    splice_positions: Literal["kept", "all"] = "kept"
    """Positions at which the model's activation is replaced: those that the token policy keeps, or all."""
    eval_seed: Seed = 0
    """Seed of the intervals, of the random decoder, and of the tokens that a masked model predicts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bootstrap == 1:
            raise SaetrainError("--bootstrap 1: one resampling gives no interval; give 0 or at least 2")


@dataclass(frozen=True)
class EvalTarget:
    """A coder that encodes raw activations x of its site's inputs and reconstructs those of the outputs, y.

    ``centre`` (D_out,) is any constant near the mean of y.
    """

    site: Site
    coder: SparseCoder
    centre: Tensor
    baselines: Baselines | None = None
    """Baselines that reconstruct y; None if they are not measured."""


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
    """Results of one coder on one text.

    ``metrics_by_class`` {class of positions: reconstruction metrics and tokens}; ``density_histogram`` as of
    :meth:`SparsitySums.density_histogram`; ``l0_percentiles`` the 5th, 50th and 95th over tokens; ``frequency`` as of
    :meth:`FrequencySums.as_json`, empty if the tokens' frequencies are unknown.
    """

    metrics: dict[str, MetricResult]
    metrics_by_class: dict[str, dict[str, float]]
    density_histogram: dict[str, Any]
    l0_percentiles: dict[str, int]
    n_documents: int
    frequency: dict[str, Any] = field(default_factory=dict)

    def to_log_record(self) -> dict[str, float]:
        """Return {name: value} of all metrics, with the expected values for random directions as `<name>_random`."""
        out: dict[str, float] = {"tokens": self.metrics["fvu"].count}
        for name, result in self.metrics.items():
            out[name] = result.estimate.value
            if RANDOM_DIRECTIONS in result.baselines:
                out[f"{name}_random"] = result.baselines[RANDOM_DIRECTIONS].value
        return {**out, **{f"l0_{name}": value for name, value in self.l0_percentiles.items()}}


@torch.no_grad()
def evaluate_coders(
    targets: Mapping[str, EvalTarget],
    batches: Iterable[LabelledActivations],
    dead_threshold: float,
    max_tokens: int | None = None,
    replicates: int = 0,
    seed: int = 0,
    token_bins: TokenBins | None = None,
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, SaeScores]:
    """Return {target: scores} over the first ``max_tokens`` tokens of ``batches``, or over all.

    Args:
        targets: the coders by name.
        batches: raw activations; those of class KEPT count for all metrics, the others only for ``metrics_by_class``.
        dead_threshold: a latent that fires on a smaller share of the tokens counts as dead.
        max_tokens: largest number of tokens of all classes.
        replicates: number of resamplings of the documents per interval; without any there are no intervals.
        seed: seed of the resamplings.
        token_bins: the bins of token ids for the FVU by token frequency; None skips it.
        on_progress: called with the number of tokens after each batch.
    """
    sums = {name: _TargetSums(target, dead_threshold, replicates, seed) for name, target in targets.items()}
    documents: set[int] = set()
    n_tokens = 0
    for batch in batches:
        count = len(batch.doc) if max_tokens is None else min(len(batch.doc), max_tokens - n_tokens)
        documents.update(np.unique(batch.doc[:count]).tolist())
        bins = None
        if token_bins is not None:
            assert batch.ids is not None
            bins = token_bins.find_bins(batch.ids)
        for start in range(0, count, CHUNK_TOKENS):
            rows = slice(start, min(start + CHUNK_TOKENS, count))
            chunk = {hookpoint: value[rows].float() for hookpoint, value in batch.values.items()}
            record_progress()
            for name, target in targets.items():
                of_chunk = None if bins is None else bins[rows]
                sums[name].add(*target.site.select_xy(chunk), batch.doc[rows], batch.token_class[rows], of_chunk)
        n_tokens += count
        on_progress(count)
        if n_tokens == max_tokens:
            break
    return {name: each.collect_scores(len(documents)) for name, each in sums.items()}


class _TargetSums:
    """Sums over tokens of one coder, and the same sums of its baselines."""

    def __init__(self, target: EvalTarget, dead_threshold: float, replicates: int, seed: int) -> None:
        self._target = target
        baselines = (RANDOM_DECODER, PCA_RECONSTRUCTION, MEAN_RECONSTRUCTION) if target.baselines is not None else ()

        def sum_sparsity() -> SparsitySums:
            return SparsitySums(target.coder.num_latents, dead_threshold, target.centre.device, replicates, seed)

        self._by_class = {
            kind: ReconstructionSums(target.centre, replicates if kind is TokenClass.KEPT else 0, seed)
            for kind in TokenClass
        }
        self._baselines = {name: ReconstructionSums(target.centre, replicates, seed) for name in baselines}
        self._sparsity, self._random_sparsity = sum_sparsity(), sum_sparsity()
        self._by_frequency: FrequencySums | None = None

    def add(
        self, x_ND: Tensor, y_ND: Tensor, docs: np.ndarray, token_class: np.ndarray, bins: np.ndarray | None
    ) -> None:
        """Add N tokens: coder inputs (N, D_in), what they reconstruct (N, D_out), documents and classes (N,).

        ``bins`` (N,): the bins of the tokens' frequencies, if they are known.
        """
        codes = self._target.coder.encode(x_ND)
        reconstruction = self._target.coder.decode(codes, x_ND)
        for kind, sums in self._by_class.items():
            is_kind = token_class == kind
            rows = torch.from_numpy(np.flatnonzero(is_kind)).to(y_ND.device)
            sums.add(y_ND[rows], reconstruction[rows], docs[is_kind])
            if kind is TokenClass.KEPT:
                self._sparsity.add(codes.select_tokens(rows), docs[is_kind])
                self._add_baselines(y_ND[rows], docs[is_kind])
                if bins is not None:
                    self._by_frequency = self._by_frequency or FrequencySums(self._target.centre)
                    self._by_frequency.add(y_ND[rows], reconstruction[rows], bins[is_kind])

    def _add_baselines(self, y_ND: Tensor, docs: np.ndarray) -> None:
        baselines = self._target.baselines
        if baselines is None:
            return
        random_codes = baselines.random_decoder.encode(y_ND)
        self._random_sparsity.add(random_codes, docs)
        self._baselines[RANDOM_DECODER].add(y_ND, baselines.random_decoder.decode(random_codes, y_ND), docs)
        self._baselines[PCA_RECONSTRUCTION].add(y_ND, baselines.pca(y_ND), docs)
        self._baselines[MEAN_RECONSTRUCTION].add(y_ND, baselines.mean.expand_as(y_ND), docs)

    def collect_scores(self, n_documents: int) -> SaeScores:
        """Return the metrics on the kept tokens, each with its baselines, and those per class."""
        kept, coder = self._by_class[TokenClass.KEPT], self._target.coder
        random_sparsity = {RANDOM_DECODER: self._random_sparsity.metric_estimates()} if self._baselines else {}
        geometry = geometry_metrics(coder.W_enc, coder.W_dec)
        directions = {RANDOM_DIRECTIONS: {name: Estimate(random) for name, (_, random) in geometry.items()}}
        by_name = {kind.name.lower(): sums for kind, sums in self._by_class.items() if sums.n_tokens}
        by_name["all"] = ReconstructionSums.merge(list(self._by_class.values()))
        return SaeScores(
            {
                **_with_baselines(
                    kept.metric_estimates(),
                    kept.n_tokens,
                    {name: sums.metric_estimates() for name, sums in self._baselines.items()},
                ),
                **_with_baselines(self._sparsity.metric_estimates(), self._sparsity.n_tokens, random_sparsity),
                **_with_baselines(
                    {name: Estimate(value) for name, (value, _) in geometry.items()}, coder.num_latents, directions
                ),
            },
            {name: {"tokens": sums.n_tokens, **sums.metric_values()} for name, sums in by_name.items()},
            self._sparsity.density_histogram(),
            self._sparsity.l0_percentiles(),
            n_documents,
            self._by_frequency.as_json() if self._by_frequency is not None else {},
        )


def _with_baselines(
    estimates: Mapping[str, Estimate], count: int, baselines: Mapping[str, Mapping[str, Estimate]]
) -> dict[str, MetricResult]:
    """Return each of ``estimates`` with the same metric of each baseline, {baseline: {metric: estimate}}."""
    return {
        name: MetricResult(estimate, count, {baseline: found[name] for baseline, found in baselines.items()})
        for name, estimate in estimates.items()
    }

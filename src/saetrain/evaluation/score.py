"""All figures of several SAEs on held-out text, each beside its nulls and with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.head import HeadModel
from saetrain.activations.read import Labelled, Place
from saetrain.coders.base import SparseCoder
from saetrain.errors import SaetrainError
from saetrain.evaluation import recovered
from saetrain.evaluation.bootstrap import ANY, DocumentSums, Estimate, Formula
from saetrain.evaluation.geometry import geometry_metrics
from saetrain.evaluation.heldout import CHUNK_TOKENS, Subject
from saetrain.evaluation.nulls import PCA, RandomDecoder
from saetrain.evaluation.reconstruction import ReconstructionSums
from saetrain.evaluation.recovered import LossScorer, SplicePolicy, answer, questions
from saetrain.evaluation.sparsity import SparsitySums
from saetrain.types import TokenSequence, shown_default

RANDOM, PRINCIPAL, MEAN, DIRECTIONS = "random_decoder", "pca", "mean", "random_directions"
MOST_SEED = (1 << 32) - 1
"""Seeds up to here give different weights of the documents."""


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Scoring: how many tokens, and how certain."""

    loss_tokens: Annotated[int | None, shown_default("8192 on a CPU, 131072 on a GPU", "INT")] = None
    """Held-out tokens of each data set over which the model's own loss is scored (0: not at all)."""
    fit_tokens: int = 20_000
    """Training tokens on which the nulls (PCA, mean) are fitted."""
    bootstrap: int = 200
    """Resamplings of the documents behind each interval (0: no intervals)."""
    splice_positions: Literal["kept", "all"] = "kept"
    """Positions whose activation is replaced for the model's loss: those that the token policy keeps, or all."""
    eval_seed: int = 0
    """Seed of the intervals, of the random decoder and of which tokens a masked model must guess."""

    def __post_init__(self) -> None:
        for name, least in (("loss_tokens", 0), ("fit_tokens", 2), ("bootstrap", 0), ("eval_seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SaetrainError(f"--{name} {value}: must be at least {least}")
        if self.eval_seed > MOST_SEED:
            raise SaetrainError(f"--eval_seed {self.eval_seed}: must be at most {MOST_SEED}")
        if self.bootstrap == 1:
            raise SaetrainError("--bootstrap 1: one resampling gives no interval; give 0 or at least 2")


@dataclass(frozen=True)
class Nulls:
    """What an SAE is held against; ``mean`` (D,) of training tokens."""

    mean: Tensor
    pca: PCA
    random: RandomDecoder


@dataclass(frozen=True)
class Figure:
    """One figure: its estimate, the tokens (or latents) behind it, the same of each null, and what to beware of."""

    estimate: Estimate
    count: int
    nulls: Mapping[str, Estimate] = field(default_factory=dict)
    flag: str = ""

    def as_json(self, formula: str) -> dict[str, Any]:
        """With ``formula``, the figure's entry in docs/metrics.md."""
        return {
            **_plain(self.estimate),
            "count": self.count,
            "formula": formula,
            "nulls": {name: _plain(estimate) for name, estimate in self.nulls.items()},
            **({"flag": self.flag} if self.flag else {}),
        }


def _plain(estimate: Estimate) -> dict[str, float | None]:
    """Numbers that JSON has; those that are not finite as null."""
    values = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclass
class Scores:
    """What is known of one SAE on one text.

    ``classes`` {class of positions: its reconstruction figures and tokens}; ``density`` the histogram.
    """

    figures: dict[str, Figure]
    classes: dict[str, dict[str, float]]
    density: dict[str, Any]
    l0_percentiles: tuple[int, int, int]
    documents: int


class _Activations:
    """Sums over the activations of one SAE."""

    def __init__(self, subject: Subject, nulls: Nulls, threshold: float, settings: ScoreSettings) -> None:
        self.subject, self.held_against = subject, nulls
        device, resample = subject.centre.device, (settings.bootstrap, settings.eval_seed)
        self.by_place = {
            place: ReconstructionSums(subject.centre, *(resample if place is Place.KEPT else ())) for place in Place
        }
        self.nulls = {name: ReconstructionSums(subject.centre, *resample) for name in (RANDOM, PRINCIPAL, MEAN)}
        latents = subject.coder.num_latents
        self.sparsity = SparsitySums(latents, threshold, device, *resample)
        self.random_sparsity = SparsitySums(latents, threshold, device, *resample)

    def add(self, x_ND: Tensor, docs: np.ndarray, places: np.ndarray) -> None:
        coder, nulls = self.subject.coder, self.held_against
        for start in range(0, len(docs), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            x, doc, place = x_ND[part].float(), docs[part], places[part]
            codes = coder.encode(x)
            estimate = coder.decode(codes)
            rows = {kind: torch.from_numpy(np.flatnonzero(place == kind)).to(x.device) for kind in Place}
            for kind, sums in self.by_place.items():
                sums.add(x[rows[kind]], estimate[rows[kind]], doc[place == kind])
            kept, whose = x[rows[Place.KEPT]], doc[place == Place.KEPT]
            self.sparsity.add(codes.select_tokens(rows[Place.KEPT]), whose)
            drawn = nulls.random.encode(kept)
            self.random_sparsity.add(drawn, whose)
            self.nulls[RANDOM].add(kept, nulls.random.decode(drawn, kept), whose)
            self.nulls[PRINCIPAL].add(kept, nulls.pca(kept), whose)
            self.nulls[MEAN].add(kept, nulls.mean.expand_as(kept), whose)

    def figures(self) -> dict[str, Figure]:
        """Of the kept tokens, each beside its nulls."""
        out: dict[str, Figure] = {}
        own = self.by_place[Place.KEPT]
        others = {name: sums.estimates() for name, sums in self.nulls.items()}
        for name, estimate in own.estimates().items():
            out[name] = Figure(estimate, own.tokens, {null: figures[name] for null, figures in others.items()})
        random = self.random_sparsity.estimates()
        for name, estimate in self.sparsity.estimates().items():
            out[name] = Figure(estimate, self.sparsity.tokens, {RANDOM: random[name]})
        return out

    def classes(self) -> dict[str, dict[str, float]]:
        """Reconstruction figures by class of positions, and of all together."""
        named = {place.name.lower(): sums for place, sums in self.by_place.items() if sums.tokens}
        first, *rest = self.by_place.values()
        named["all"] = first.plus(rest)
        return {name: {"tokens": sums.tokens, **sums.metrics()} for name, sums in named.items()}


@torch.no_grad()
def score_activations(
    subjects: Mapping[str, Subject],
    nulls: Mapping[str, Nulls],
    batches: Iterable[Labelled],
    threshold: float,
    settings: ScoreSettings,
    done: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Scores]:
    """{SAE: scores} over all of ``batches``; ``threshold`` is the rate below which a latent is dead.

    ``done`` is told the tokens of each batch.
    """
    sums = {name: _Activations(subject, nulls[name], threshold, settings) for name, subject in subjects.items()}
    documents: set[int] = set()
    for batch in batches:
        documents.update(np.unique(batch.doc).tolist())
        for each in sums.values():
            each.add(batch.values[each.subject.hookpoint], batch.doc, batch.place)
        done(len(batch.doc))
    return {
        name: Scores(
            {**each.figures(), **_geometry(each.subject.coder)},
            each.classes(),
            each.sparsity.histogram(),
            each.sparsity.l0_percentiles(),
            len(documents),
        )
        for name, each in sums.items()
    }


def _geometry(coder: SparseCoder) -> dict[str, Figure]:
    found = geometry_metrics(coder.W_enc, coder.W_dec)
    return {
        name: Figure(Estimate(value), coder.num_latents, {DIRECTIONS: Estimate(found[f"{name}_random"])})
        for name, value in found.items()
        if not name.endswith("_random")
    }


def score_losses(
    subjects: Mapping[str, Subject],
    nulls: Mapping[str, Nulls],
    head: HeadModel,
    groups: Iterable[list[TokenSequence]],
    policies: Mapping[str, SplicePolicy],
    mask_id: int | None,
    batch_tokens: int,
    settings: ScoreSettings,
    done: Callable[[int], object] = lambda tokens: None,
) -> dict[str, dict[str, Figure]]:
    """{SAE: figures} of the model's own loss over ``groups`` of sequences.

    ``policies`` {hookpoint: which positions are replaced}.
    """
    scorers = {
        name: LossScorer(
            head,
            subject.hookpoint,
            _variants(subject.coder, nulls[name]),
            policies[subject.hookpoint],
            settings.bootstrap,
            settings.eval_seed,
        )
        for name, subject in subjects.items()
    }
    first = next(iter(policies.values()))
    for group in groups:
        for question in questions(head, group, first, mask_id, batch_tokens, settings.eval_seed):
            with torch.no_grad():
                clean = answer(head, question)
            for scorer in scorers.values():
                scorer.add(question, clean)
            done(int(question.mask.sum()))
    return {name: _loss_figures(head, scorer) for name, scorer in scorers.items()}


def _variants(coder: SparseCoder, nulls: Nulls) -> dict[str, recovered.Replace]:
    return {
        recovered.SAE: lambda x: coder.decode(coder.encode(x)),
        recovered.ZERO: torch.zeros_like,
        recovered.MEAN: nulls.mean.expand_as,
        RANDOM: nulls.random,
        PRINCIPAL: nulls.pca,
    }


def _loss_figures(head: HeadModel, scorer: LossScorer) -> dict[str, Figure]:
    if not scorer.tokens:
        return {}
    if head.kind == "none":
        hidden = _beside_nulls(scorer.sums, recovered.hidden_formulas, scorer.tokens)
        sequences = int(scorer.pooled.total["sequences"])
        return {**hidden, **_beside_nulls(scorer.pooled, recovered.pooled_formulas, sequences)}
    alone = {
        name: Figure(scorer.sums.estimate(formula, recovered.POSSIBLE[name]), scorer.tokens)
        for name, formula in recovered.ALONE.items()
    }
    return {**alone, **_beside_nulls(scorer.sums, recovered.loss_formulas, scorer.tokens)}


def _beside_nulls(sums: DocumentSums, formulas: Callable[[str], dict[str, Formula]], count: int) -> dict[str, Figure]:
    """Each figure of the SAE with the same of what takes its place; the mean's is the mean ablation."""
    nulls = {name: formulas(name) for name in (RANDOM, PRINCIPAL, recovered.MEAN)}
    out = {}
    for name, formula in formulas(recovered.SAE).items():
        possible = recovered.POSSIBLE.get(name, ANY)
        flag = "small denominator" if recovered.small_denominator(sums.total, name) else ""
        beside = {null: sums.estimate(others[name], possible) for null, others in nulls.items()}
        out[name] = Figure(sums.estimate(formula, possible), count, beside, flag)
    return out

"""The verdict on an SAE: four held-out metrics against thresholds, with reasons and advice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from saetrain.atomic_io import replace_non_finite
from saetrain.errors import SaetrainError
from saetrain.evaluation.bootstrap import Estimate
from saetrain.settings import MAX_FACTOR, Factor, Range, Settings, Share

MAX_SPARSE_L0_FRACTION = 0.05
"""Share of latents active per token above which a code is barely sparse."""
MIN_JUDGED_STEPS = 300
"""Optimizer steps of the shortest run that can fail a check; most checks need longer training."""
NOT_JUDGED = "n/a"
"""Status of a check that the metric does not meet for another reason than the SAE's quality."""
ExplainedVariance = Annotated[float, Range(-MAX_FACTOR, 1)]
Cosine = Annotated[float, Range(-1, 1)]


@dataclass(frozen=True, kw_only=True)
class HealthSettings(Settings):
    """Health: the thresholds of the verdict."""

    min_explained_variance: ExplainedVariance = 0.60
    """Smallest explained variance of held-out activations that passes."""
    good_explained_variance: ExplainedVariance = 0.70
    """Smallest explained variance of held-out activations that counts as good."""
    l0_range: tuple[Factor, Factor] = (20.0, 200.0)
    """Smallest and largest mean number of active latents per token (L0) that pass."""
    max_dead: Share = 0.20
    """Largest share of dead latents (by --dead_percentage_threshold) that passes."""
    good_dead: Share = 0.10
    """Largest share of dead latents (by --dead_percentage_threshold) that counts as good."""
    max_redundancy_excess: Cosine = 0.5
    """Largest decoder redundancy above that of random directions that passes (provisional)."""
    max_near_duplicates: Share = 0.01
    """Largest share of latents with a near duplicate (decoder cosine above 0.9) that passes (provisional)."""
    max_redundancy: Cosine = 0.25
    """Fixed limit of decoder redundancy; it is reported next to the verdict and does not change it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.l0_range) != 2:
            raise SaetrainError(f"--l0_range: give 2 numbers, smallest and largest; found {len(self.l0_range)}")
        low, high = self.l0_range
        if low > high:
            raise SaetrainError(f"--l0_range {low:g} {high:g}: give the smaller number first")
        if self.min_explained_variance > self.good_explained_variance:
            raise SaetrainError(
                f"--min_explained_variance {self.min_explained_variance:g}: must not be above "
                f"--good_explained_variance {self.good_explained_variance:g}"
            )
        if self.good_dead > self.max_dead:
            raise SaetrainError(f"--good_dead {self.good_dead:g}: must not be above --max_dead {self.max_dead:g}")


@dataclass(frozen=True)
class SaeProperties:
    """Properties of the SAE and of the scored text that the verdict needs in addition to the metrics."""

    num_latents: int
    expected_l0: float | None
    """L0 that the SAE's settings fix, as that of each token or as the mean over tokens; None if they fix none."""
    min_dead_fraction: float
    """Smallest share of latents that count as dead by ``dead_threshold`` after any training."""
    dead_threshold: float
    """Share of tokens below which a latent counts as dead."""
    n_tokens: int
    """Number of scored tokens."""
    steps: int | None = None
    """Optimizer steps of the training; None if they are unknown."""
    diverged_step: int | None = None
    """Step whose loss spike ended the training early, or None."""


@dataclass(frozen=True)
class Judgment:
    """The verdict on one metric; ``status`` is `good`, `pass`, `fail` or `n/a` (not judged)."""

    value: float
    low: float
    high: float
    baselines: dict[str, float]
    """The same metric of each baseline, by name."""
    threshold: str
    status: str
    by_construction: bool
    """Whether no training can meet the threshold at this width, ``num_latents`` and k."""
    reason: str
    advice: str

    @property
    def is_passing(self) -> bool:
        """Whether the status is `good` or `pass`."""
        return self.status in ("good", "pass")

    @property
    def is_judged(self) -> bool:
        """Whether the status is not `n/a`."""
        return self.status != NOT_JUDGED

    def as_json(self) -> dict[str, Any]:
        """Return all fields for JSON, with null for numbers that are not finite."""
        # The files call the baselines "nulls".
        names = {"baselines": "nulls"}
        values = replace_non_finite(asdict(self))
        return {names.get(name, name): value for name, value in values.items()}


@dataclass(frozen=True)
class Verdict:
    """The judgments on all metrics; prints as ``3/4``, the number that pass out of those that are judged.

    That of an SAE whose training diverged prints as ``diverged``.
    """

    judgments: dict[str, Judgment]
    steps: int | None = None
    """Optimizer steps of the training; None if they are unknown."""
    diverged_step: int | None = None
    """Step whose loss spike ended the training early, or None."""

    @property
    def n_passed(self) -> int:
        """Number of metrics that pass."""
        return sum(judgment.is_passing for judgment in self.judgments.values())

    @property
    def n_judged(self) -> int:
        """Number of metrics that are judged."""
        return sum(judgment.is_judged for judgment in self.judgments.values())

    def __str__(self) -> str:
        return "diverged" if self.diverged_step is not None else f"{self.n_passed}/{self.n_judged}"

    def describe_checks(self) -> str:
        """Return one line: the number of checks that pass, those that fail, and why others are not judged."""
        failed = [name for name, judgment in self.judgments.items() if judgment.status == "fail"]
        excused = [
            f"{name} ({'fixed by k' if judgment.by_construction else 'short run'})"
            for name, judgment in self.judgments.items()
            if not judgment.is_judged
        ]
        parts = (("fails", failed), ("not judged", excused))
        passed = f"{self.n_passed}/{self.n_judged} checks pass"
        line = "; ".join([passed, *(f"{what} {', '.join(names)}" for what, names in parts if names)])
        if self.diverged_step is not None:
            return f"diverged at step {self.diverged_step}; these are the weights of step {self.steps}; {line}"
        is_short = self.steps is not None and self.steps < MIN_JUDGED_STEPS
        return f"{line}; only {self.steps} steps, more tokens would help" if is_short and not excused else line

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as it is stored in ``final_assessment.json``."""
        return {
            "verdict": str(self),
            "passed": self.n_passed,
            "of": self.n_judged,
            "metrics": {name: judgment.as_json() for name, judgment in self.judgments.items()},
        }


def judge_metrics(
    metrics: Mapping[str, Estimate],
    baselines: Mapping[str, dict[str, float]],
    sae: SaeProperties,
    settings: HealthSettings,
) -> Verdict:
    """Return the verdict on ``metrics``.

    Args:
        metrics: must contain explained_variance, l0, dead_below_threshold, decoder_redundancy_top100 and
            decoder_near_duplicates.
        baselines: {metric: {baseline: value}}; entries may be missing.
        sae: properties of the SAE and of the scored text.
        settings: the thresholds.
    """
    judgments = {
        "explained_variance": _judge_explained_variance(metrics, baselines, settings),
        "l0": _judge_l0(metrics, sae, settings),
        "dead": _judge_dead(metrics, baselines, sae, settings),
        "redundancy": _judge_redundancy(metrics, baselines, settings),
    }
    if metrics["explained_variance"].value >= 0:
        judgments = {name: _excuse_short_run(judgment, sae.steps) for name, judgment in judgments.items()}
    return Verdict(judgments, sae.steps, sae.diverged_step)


def _excuse_short_run(judgment: Judgment, steps: int | None) -> Judgment:
    """Return the judgment as not judged if it fails after too few steps."""
    if judgment.status != "fail" or steps is None or steps >= MIN_JUDGED_STEPS:
        return judgment
    reason = f"{judgment.reason}; not judged, because {steps:,} steps are too few (at least {MIN_JUDGED_STEPS})"
    return replace(judgment, status=NOT_JUDGED, reason=reason)


def _format_baselines(baselines: Mapping[str, float], spec: str) -> str:
    """Return `` (random decoder 39.5%, …)``, or an empty string without baselines."""
    listed = ", ".join(f"{name} {value:{spec}}" for name, value in baselines.items())
    return f" ({listed})" if listed else ""


def _build_judgment(
    estimate: Estimate, baselines: Mapping[str, float], threshold: str, status: str, **fields: Any
) -> Judgment:
    return Judgment(estimate.value, estimate.low, estimate.high, dict(baselines), threshold, status, **fields)


def _judge_explained_variance(
    metrics: Mapping[str, Estimate], baselines: Mapping[str, dict[str, float]], settings: HealthSettings
) -> Judgment:
    estimate, own_baselines = metrics["explained_variance"], baselines.get("explained_variance", {})
    value, min_passing, min_good = estimate.value, settings.min_explained_variance, settings.good_explained_variance
    status = "good" if value >= min_good else "pass" if value >= min_passing else "fail"
    reason = f"the SAE explains {value:.1%} of the variance around the mean{_format_baselines(own_baselines, '.1%')}"
    best_baseline = max(own_baselines, key=lambda name: own_baselines[name]) if own_baselines else None
    baseline_remark = (
        f"{best_baseline} explains at least as much with as many values per token"
        if best_baseline and value <= own_baselines[best_baseline]
        else ""
    )
    advice = baseline_remark
    if not math.isfinite(value):
        reason = "the evaluated activations do not vary, or the SAE's output is not finite"
        advice = "check the weights of the SAE"
    elif value < 0:
        advice = "worse than predicting the mean: check that the SAE belongs to this model and layer, and lower the lr"
    elif status == "fail":
        # A larger k would raise an L0 that is already too high.
        settings_to_raise = "num_latents or k" if metrics["l0"].value < settings.l0_range[1] else "num_latents"
        advice = f"train on more tokens, raise {settings_to_raise}, or try another lr" + (
            f"; {baseline_remark}" if baseline_remark else ""
        )
    elif baseline_remark:
        advice += ", so the threshold is not informative here; train on more tokens or raise num_latents"
    elif status == "pass":
        advice = f"more tokens or latents may raise it to {min_good:.0%}"
    return _build_judgment(
        estimate,
        own_baselines,
        f">= {min_passing:g} (good: {min_good:g})",
        status,
        by_construction=False,
        reason=reason,
        advice=advice,
    )


def _judge_l0(metrics: Mapping[str, Estimate], sae: SaeProperties, settings: HealthSettings) -> Judgment:
    estimate, (low, high) = metrics["l0"], settings.l0_range
    l0_fraction = estimate.value / sae.num_latents
    is_in_range = low <= estimate.value <= high
    fixed = sae.expected_l0
    is_unreachable = fixed is not None and not is_in_range and (fixed < low or estimate.value > high)
    reason = f"{estimate.value:.1f} of {sae.num_latents:,} latents are active per token ({l0_fraction:.1%})"
    if is_unreachable:
        reason += f"; L0 is set by k = {fixed:g}, so no training can bring it into the range"
    advice = ""
    if estimate.value < low:
        # Raising k alone would make the code barely sparse if there are few latents.
        advice = "raise k and num_latents" if low / sae.num_latents > MAX_SPARSE_L0_FRACTION else "raise k"
    elif estimate.value > high:
        advice = "lower k"
    elif l0_fraction > MAX_SPARSE_L0_FRACTION:
        advice = f"L0/F = {l0_fraction:.0%}: the code is barely sparse; raise num_latents"
    threshold, status = f"{low:g} to {high:g}", "pass" if is_in_range else NOT_JUDGED if is_unreachable else "fail"
    return _build_judgment(
        estimate, {}, threshold, status, by_construction=is_unreachable, reason=reason, advice=advice
    )


def _judge_dead(
    metrics: Mapping[str, Estimate],
    baselines: Mapping[str, dict[str, float]],
    sae: SaeProperties,
    settings: HealthSettings,
) -> Judgment:
    estimate, own_baselines = metrics["dead_below_threshold"], baselines.get("dead_below_threshold", {})
    value = estimate.value
    status = "good" if value <= settings.good_dead else "pass" if value <= settings.max_dead else "fail"
    is_unreachable = sae.min_dead_fraction > settings.max_dead
    reason = (
        f"{value:.1%} of the latents fire on less than {sae.dead_threshold:.3g} of the {sae.n_tokens:,} evaluated "
        f"tokens (--dead_percentage_threshold){_format_baselines(own_baselines, '.1%')}"
    )
    advice = (
        ""
        if status == "good"
        else "train on more tokens or with fewer latents; a lower --lr also leaves fewer dead, but raises the FVU"
    )
    if status == "fail" and any(baseline > settings.max_dead for baseline in own_baselines.values()):
        reason += "; random directions are above the threshold too"
        advice += "; compare the share with its random baseline"
    if 0 < sae.n_tokens * sae.dead_threshold < 1:
        reason += "; too few tokens were evaluated to distinguish so low a rate from zero"
        advice = f"evaluate on at least {math.ceil(1 / sae.dead_threshold):,} tokens (--eval_tokens)"
    if is_unreachable:
        reason += (
            f"; at this k and num_latents at least {sae.min_dead_fraction:.1%} count as dead after any training, "
            "so the threshold can't be met"
        )
        advice = "lower --dead_percentage_threshold, or lower num_latents or raise k"
        status = NOT_JUDGED
    threshold = f"<= {settings.max_dead:g} (good: {settings.good_dead:g})"
    return _build_judgment(
        estimate, own_baselines, threshold, status, by_construction=is_unreachable, reason=reason, advice=advice
    )


def _judge_redundancy(
    metrics: Mapping[str, Estimate], baselines: Mapping[str, dict[str, float]], settings: HealthSettings
) -> Judgment:
    name, duplicates_name = "decoder_redundancy_top100", "decoder_near_duplicates"
    own_baselines = baselines.get(name, {})
    excess, duplicates = (
        _excess_over_baselines(metrics[key], baselines.get(key, {})) for key in (name, duplicates_name)
    )
    value, limit = metrics[name].value, settings.max_redundancy
    is_passing = excess <= settings.max_redundancy_excess and duplicates <= settings.max_near_duplicates
    is_met = "met" if value <= limit else "exceeded"
    reason = (
        f"the 100 most similar pairs of decoder rows have a mean cosine of {value:.3f}"
        f"{_format_baselines(own_baselines, '.3f')}, and {metrics[duplicates_name].value:.2%} of the latents have a "
        f"near duplicate (the older limit of {limit:g}, which is {is_met}, decides nothing)"
    )
    return _build_judgment(
        metrics[name],
        own_baselines,
        f"<= random + {settings.max_redundancy_excess:g}, near duplicates <= {settings.max_near_duplicates:.3g}",
        "pass" if is_passing else "fail",
        by_construction=False,
        reason=reason,
        advice="" if is_passing else "train on more tokens, with fewer latents or at a lower lr",
    )


def _excess_over_baselines(estimate: Estimate, baselines: Mapping[str, float]) -> float:
    """Return how far the value is above its largest finite baseline; without one, 0 for nan and else the value."""
    known = [baseline for baseline in baselines.values() if math.isfinite(baseline)]
    if known:
        return estimate.value - max(known)
    return 0.0 if math.isnan(estimate.value) else estimate.value

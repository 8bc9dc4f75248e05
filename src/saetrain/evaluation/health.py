"""The verdict on an SAE: four held-out metrics against thresholds, with reasons and advice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from saetrain.atomic_io import replace_non_finite
from saetrain.errors import SaetrainError
from saetrain.evaluation.bootstrap import AT_MOST_ONE, COSINE_RANGE, FRACTION_RANGE, Estimate

MAX_SPARSE_L0_FRACTION = 0.05
"""Share of latents active per token above which a code is barely sparse."""
WIDE_EXPANSION_FACTOR = 4
"""Latents per input dimension from which an SAE counts as wide."""
THRESHOLD_RANGES = {
    "min_explained_variance": AT_MOST_ONE,
    "good_explained_variance": AT_MOST_ONE,
    "max_dead": FRACTION_RANGE,
    "good_dead": FRACTION_RANGE,
    "max_redundancy": COSINE_RANGE,
}
"""Range of the metric that each threshold applies to."""


@dataclass(frozen=True, kw_only=True)
class HealthSettings:
    """Health: the thresholds of the verdict."""

    min_explained_variance: float = 0.60
    """Smallest explained variance of held-out activations that passes."""
    good_explained_variance: float = 0.70
    """Smallest explained variance of held-out activations that counts as good."""
    l0_range: tuple[float, float] = (20.0, 200.0)
    """Smallest and largest mean number of active latents per token (L0) that pass."""
    max_dead: float = 0.20
    """Largest share of dead latents (by --dead_percentage_threshold) that passes."""
    good_dead: float = 0.10
    """Largest share of dead latents (by --dead_percentage_threshold) that counts as good."""
    max_redundancy: float = 0.25
    """Largest decoder redundancy that passes: the mean of the 100 largest cosines between decoder rows."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(map(math.isfinite, numbers)):
                raise SaetrainError(f"--{name} {' '.join(f'{n:g}' for n in numbers)}: must be finite")
        for name, (least, most) in THRESHOLD_RANGES.items():
            share = getattr(self, name)
            if not least <= share <= most:
                allowed = f"{least:g} to {most:g}" if math.isfinite(least) else f"at most {most:g}"
                raise SaetrainError(f"--{name} {share:g}: must be {allowed}; give a fraction, 0.6 instead of 60 %")
        if len(self.l0_range) != 2:
            raise SaetrainError(f"--l0_range: give 2 numbers, smallest and largest; found {len(self.l0_range)}")
        low, high = self.l0_range
        if not 0 <= low <= high:
            raise SaetrainError(f"--l0_range {low:g} {high:g}: give the smaller number first, and none below 0")
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

    d_in: int
    num_latents: int
    expected_l0: float | None
    """L0 that the SAE's settings fix, which is also the largest possible; None if they fix none."""
    min_dead_fraction: float
    """Smallest share of latents that count as dead by ``dead_threshold`` after any training."""
    dead_threshold: float
    """Share of tokens below which a latent counts as dead."""
    n_tokens: int
    """Number of scored tokens."""


@dataclass(frozen=True)
class Judgment:
    """The verdict on one metric; ``status`` is `good`, `pass` or `fail`."""

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
        return self.status != "fail"

    def as_json(self) -> dict[str, Any]:
        """Return all fields for JSON, with null for numbers that are not finite."""
        # The files call the baselines "nulls".
        names = {"baselines": "nulls"}
        values = {**replace_non_finite(asdict(self)), "baselines": replace_non_finite(self.baselines)}
        return {names.get(name, name): value for name, value in values.items()}


@dataclass(frozen=True)
class Verdict:
    """The judgments on all metrics; prints as ``4/4``, the number that pass out of all."""

    judgments: dict[str, Judgment]

    @property
    def n_passed(self) -> int:
        """Number of metrics that pass."""
        return sum(judgment.is_passing for judgment in self.judgments.values())

    def __str__(self) -> str:
        return f"{self.n_passed}/{len(self.judgments)}"

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as it is stored in ``final_assessment.json``."""
        return {
            "verdict": str(self),
            "passed": self.n_passed,
            "of": len(self.judgments),
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
        metrics: must contain explained_variance, l0, dead_below_threshold and decoder_redundancy_top100.
        baselines: {metric: {baseline: value}}; entries may be missing.
        sae: properties of the SAE and of the scored text.
        settings: the thresholds.
    """
    return Verdict(
        {
            "explained_variance": _judge_explained_variance(metrics, baselines, settings),
            "l0": _judge_l0(metrics, sae, settings),
            "dead": _judge_dead(metrics, baselines, sae, settings),
            "redundancy": _judge_redundancy(metrics, baselines, sae, settings),
        }
    )


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
    threshold, status = f"{low:g} to {high:g}", "pass" if is_in_range else "fail"
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
    threshold = f"<= {settings.max_dead:g} (good: {settings.good_dead:g})"
    return _build_judgment(
        estimate, own_baselines, threshold, status, by_construction=is_unreachable, reason=reason, advice=advice
    )


def _judge_redundancy(
    metrics: Mapping[str, Estimate],
    baselines: Mapping[str, dict[str, float]],
    sae: SaeProperties,
    settings: HealthSettings,
) -> Judgment:
    estimate, own_baselines = metrics["decoder_redundancy_top100"], baselines.get("decoder_redundancy_top100", {})
    is_in_range = estimate.value <= settings.max_redundancy
    is_unreachable = not is_in_range and any(value > settings.max_redundancy for value in own_baselines.values())
    reason = (
        f"the 100 most similar pairs of decoder rows have a mean cosine of {estimate.value:.3f}"
        f"{_format_baselines(own_baselines, '.3f')}"
    )
    advice = "" if is_in_range else "use a lower lr to get fewer near copies"
    if not is_in_range and sae.num_latents >= WIDE_EXPANSION_FACTOR * sae.d_in:
        advice = "a few near copies are usual in a wide SAE; use fewer latents or a lower lr to get fewer"
    if is_unreachable:
        reason += (
            f"; {sae.num_latents:,} random directions in {sae.d_in} dimensions are above the threshold too, so it is "
            "not informative here"
        )
        advice = "compare the redundancy with its random baseline, or raise --max_redundancy"
    threshold, status = f"<= {settings.max_redundancy:g}", "pass" if is_in_range else "fail"
    return _build_judgment(
        estimate, own_baselines, threshold, status, by_construction=is_unreachable, reason=reason, advice=advice
    )

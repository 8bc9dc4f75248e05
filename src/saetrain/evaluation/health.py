"""Is the SAE healthy? Four figures against thresholds that can be set, with reasons and advice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from saetrain.errors import SaetrainError
from saetrain.evaluation.bootstrap import AT_MOST_ONE, COSINE_RANGE, FRACTION_RANGE, Estimate

MAX_SPARSE_L0_FRACTION = 0.05
"""Share of latents active on a token above which a code is hardly sparse."""
WIDE_EXPANSION_FACTOR = 4
"""Latents per dimension from which an SAE is wide."""
THRESHOLD_RANGES = {
    "min_explained_variance": AT_MOST_ONE,
    "good_explained_variance": AT_MOST_ONE,
    "max_dead": FRACTION_RANGE,
    "good_dead": FRACTION_RANGE,
    "max_redundancy": COSINE_RANGE,
}
"""Threshold -> what its figure can be."""


@dataclass(frozen=True, kw_only=True)
class HealthSettings:
    """Health: the thresholds of the verdict."""

    min_explained_variance: float = 0.60
    """Least explained variance of held-out activations that passes."""
    good_explained_variance: float = 0.70
    """Explained variance that is good."""
    l0_range: tuple[float, float] = (20.0, 200.0)
    """Active latents per token that pass, from and to."""
    max_dead: float = 0.20
    """Largest share of dead latents (by --dead_percentage_threshold) that passes."""
    good_dead: float = 0.10
    """Share of dead latents that is good."""
    max_redundancy: float = 0.25
    """Largest mean of the 100 largest cosines between decoder rows that passes."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(map(math.isfinite, numbers)):
                raise SaetrainError(f"--{name} {' '.join(f'{n:g}' for n in numbers)}: must be finite")
        for name, (least, most) in THRESHOLD_RANGES.items():
            share = getattr(self, name)
            if not least <= share <= most:
                allowed = f"{least:g} to {most:g}" if math.isfinite(least) else f"at most {most:g}"
                raise SaetrainError(f"--{name} {share:g}: must be {allowed}; it is a share, 0.6 for 60 %")
        if len(self.l0_range) != 2:
            raise SaetrainError(f"--l0_range: takes 2 numbers, from and to; found {len(self.l0_range)}")
        low, high = self.l0_range
        if not 0 <= low <= high:
            raise SaetrainError(f"--l0_range {low:g} {high:g}: give the smaller number first, none below 0")
        if self.min_explained_variance > self.good_explained_variance:
            raise SaetrainError(
                f"--min_explained_variance {self.min_explained_variance:g}: must not be above "
                f"--good_explained_variance {self.good_explained_variance:g}"
            )
        if self.good_dead > self.max_dead:
            raise SaetrainError(f"--good_dead {self.good_dead:g}: must not be above --max_dead {self.max_dead:g}")


@dataclass(frozen=True)
class SaeProperties:
    """What the verdict must know of the SAE beside its figures."""

    d_in: int
    num_latents: int
    k: int | None
    """None where the code is not TopK's."""
    min_dead_fraction: float
    """Least share that the rate rule calls dead whatever the training does."""
    dead_threshold: float
    """The rate below which a latent is dead."""
    n_tokens: int
    """Those that were scored."""


@dataclass(frozen=True)
class Judgment:
    """One figure's part of the verdict; ``status`` is `good`, `pass` or `fail`."""

    value: float
    low: float
    high: float
    nulls: dict[str, float]
    """The same of what has learned nothing, by its name."""
    threshold: str
    status: str
    by_construction: bool
    """The threshold can't be met by any training of this shape."""
    reason: str
    advice: str

    @property
    def is_passing(self) -> bool:
        """Whether it counts for the verdict."""
        return self.status != "fail"

    def as_json(self) -> dict[str, Any]:
        """All of it; numbers that are not finite as null."""
        values = asdict(self)
        return {
            **{name: _finite_or_none(value) if isinstance(value, float) else value for name, value in values.items()},
            "nulls": {name: _finite_or_none(value) for name, value in self.nulls.items()},
        }


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Verdict:
    """``4/4`` and what it is made of."""

    judgments: dict[str, Judgment]

    @property
    def n_passed(self) -> int:
        """Figures that pass."""
        return sum(judgment.is_passing for judgment in self.judgments.values())

    def __str__(self) -> str:
        return f"{self.n_passed}/{len(self.judgments)}"

    def as_json(self) -> dict[str, Any]:
        """As ``final_assessment.json`` holds it."""
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
    """The verdict on ``figures`` (explained_variance, l0, dead_below_threshold, decoder_redundancy_top100).

    ``nulls`` {figure: {what has learned nothing: its value}}.
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
    """``; random decoder 39.5%, …``, or nothing."""
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
    reason = f"the SAE explains {value:.1%} of the variance about the mean{_format_baselines(own_baselines, '.1%')}"
    best_baseline = max(own_baselines, key=lambda name: own_baselines[name]) if own_baselines else None
    baseline_remark = (
        f"{best_baseline} does no worse with as many numbers a token"
        if best_baseline and value <= own_baselines[best_baseline]
        else ""
    )
    advice = baseline_remark
    if not math.isfinite(value):
        reason, advice = "the activations scored do not vary, or the SAE's output is not finite", "check its weights"
    elif value < 0:
        advice = "worse than predicting the mean: check that model, layer and scale are those it was trained on"
    elif status == "fail":
        # A larger k is no advice where L0 is too high already.
        settings_to_raise = "num_latents or k" if metrics["l0"].value < settings.l0_range[1] else "num_latents"
        advice = f"train on more tokens, raise {settings_to_raise}, or try another lr" + (
            f"; {baseline_remark}" if baseline_remark else ""
        )
    elif baseline_remark:
        advice += ": the threshold says little here; train on more tokens or raise num_latents"
    elif status == "pass":
        advice = f"more tokens or latents may bring it to {min_good:.0%}"
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
    # With TopK the most that L0 can be is k.
    is_unreachable = sae.k is not None and not is_in_range and (sae.k < low or estimate.value > high)
    reason = f"{estimate.value:.1f} of {sae.num_latents:,} latents are active on a token ({l0_fraction:.1%})"
    if is_unreachable:
        reason += f"; k = {sae.k} fixes it, so no training can bring it into the range"
    advice = ""
    if estimate.value < low:
        # Were k alone raised so far, the code would be hardly sparse.
        advice = "raise k and num_latents" if low / sae.num_latents > MAX_SPARSE_L0_FRACTION else "raise k"
    elif estimate.value > high:
        advice = "lower k"
    elif l0_fraction > MAX_SPARSE_L0_FRACTION:
        advice = f"L0/F = {l0_fraction:.0%}: the code is hardly sparse; raise num_latents"
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
        f"{value:.1%} of the latents fire on less than {sae.dead_threshold:.3g} of the {sae.n_tokens:,} tokens scored "
        f"(--dead_percentage_threshold){_format_baselines(own_baselines, '.1%')}"
    )
    advice = (
        ""
        if status == "good"
        else "more tokens or fewer latents leave fewer of them dead, as does a lower --lr at the price of a higher FVU"
    )
    if status == "fail" and any(baseline > settings.max_dead for baseline in own_baselines.values()):
        reason += "; directions that have learned nothing are over the threshold too"
        advice += "; read it beside the random figure"
    if 0 < sae.n_tokens * sae.dead_threshold < 1:
        reason += "; scored on too few tokens, for so low a rate can't be told from none"
        advice = f"score on at least {math.ceil(1 / sae.dead_threshold):,} tokens (--eval_tokens)"
    if is_unreachable:
        reason += (
            f"; at least {sae.min_dead_fraction:.1%} must at this k and num_latents, so the threshold can't be met"
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
    reason = f"the 100 most alike pairs of decoder rows have a mean cosine of {estimate.value:.3f}{_format_baselines(own_baselines, '.3f')}"
    advice = "" if is_in_range else "a lower lr makes fewer near copies"
    if not is_in_range and sae.num_latents >= WIDE_EXPANSION_FACTOR * sae.d_in:
        advice = "a few near copies are usual in a wide SAE; fewer latents or a lower lr make fewer of them"
    if is_unreachable:
        reason += (
            f"; {sae.num_latents:,} directions in {sae.d_in} dimensions can hardly be less alike, so the threshold "
            "says nothing here"
        )
        advice = "read it beside the random figure, or set --max_redundancy"
    threshold, status = f"<= {settings.max_redundancy:g}", "pass" if is_in_range else "fail"
    return _build_judgment(
        estimate, own_baselines, threshold, status, by_construction=is_unreachable, reason=reason, advice=advice
    )

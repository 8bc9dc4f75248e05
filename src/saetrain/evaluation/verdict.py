"""Is the SAE healthy? Four figures against thresholds that can be set, with reasons and advice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from saetrain.errors import SaetrainError
from saetrain.evaluation.bootstrap import AT_MOST_ONE, COSINE, SHARE, Estimate

HARDLY_SPARSE = 0.05
"""Share of latents active on a token above which a code is hardly sparse."""
WIDE = 4
"""Latents per dimension from which an SAE is wide."""
SHARES = {
    "min_explained_variance": AT_MOST_ONE,
    "good_explained_variance": AT_MOST_ONE,
    "max_dead": SHARE,
    "good_dead": SHARE,
    "max_redundancy": COSINE,
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
        for name, (least, most) in SHARES.items():
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
class Shape:
    """What the verdict must know of the SAE beside its figures."""

    d_in: int
    num_latents: int
    k: int | None
    """None where the code is not TopK's."""
    dead_bound: float
    """Least share that the rate rule calls dead whatever the training does."""
    dead_rate: float
    """The rate below which a latent is dead."""
    tokens: int
    """Those that were scored."""


@dataclass(frozen=True)
class Judged:
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
    def passed(self) -> bool:
        """Whether it counts for the verdict."""
        return self.status != "fail"

    def as_json(self) -> dict[str, Any]:
        """All of it; numbers that are not finite as null."""
        values = asdict(self)
        return {
            **{name: _or_null(value) if isinstance(value, float) else value for name, value in values.items()},
            "nulls": {name: _or_null(value) for name, value in self.nulls.items()},
        }


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Verdict:
    """``4/4`` and what it is made of."""

    metrics: dict[str, Judged]

    @property
    def passed(self) -> int:
        """Figures that pass."""
        return sum(judged.passed for judged in self.metrics.values())

    def __str__(self) -> str:
        return f"{self.passed}/{len(self.metrics)}"

    def as_json(self) -> dict[str, Any]:
        """As ``final_assessment.json`` holds it."""
        return {
            "verdict": str(self),
            "passed": self.passed,
            "of": len(self.metrics),
            "metrics": {name: judged.as_json() for name, judged in self.metrics.items()},
        }


def judge(
    figures: Mapping[str, Estimate], nulls: Mapping[str, dict[str, float]], shape: Shape, settings: HealthSettings
) -> Verdict:
    """The verdict on ``figures`` (explained_variance, l0, dead_below_threshold, decoder_redundancy_top100).

    ``nulls`` {figure: {what has learned nothing: its value}}.
    """
    return Verdict(
        {
            "explained_variance": _explained_variance(figures, nulls, settings),
            "l0": _l0(figures, shape, settings),
            "dead": _dead(figures, nulls, shape, settings),
            "redundancy": _redundancy(figures, nulls, shape, settings),
        }
    )


def _shown(nulls: Mapping[str, float], spec: str) -> str:
    """``; random decoder 39.5%, …``, or nothing."""
    listed = ", ".join(f"{name} {value:{spec}}" for name, value in nulls.items())
    return f" ({listed})" if listed else ""


def _judged(figure: Estimate, nulls: Mapping[str, float], threshold: str, status: str, **rest: Any) -> Judged:
    return Judged(figure.value, figure.low, figure.high, dict(nulls), threshold, status, **rest)


def _explained_variance(
    figures: Mapping[str, Estimate], nulls: Mapping[str, dict[str, float]], settings: HealthSettings
) -> Judged:
    figure, others = figures["explained_variance"], nulls.get("explained_variance", {})
    value, least, good = figure.value, settings.min_explained_variance, settings.good_explained_variance
    status = "good" if value >= good else "pass" if value >= least else "fail"
    reason = f"the SAE explains {value:.1%} of the variance about the mean{_shown(others, '.1%')}"
    best = max(others, key=lambda name: others[name]) if others else None
    beaten = f"{best} does no worse with as many numbers a token" if best and value <= others[best] else ""
    advice = beaten
    if not math.isfinite(value):
        reason, advice = "the activations scored do not vary, or the SAE's output is not finite", "check its weights"
    elif value < 0:
        advice = "worse than predicting the mean: check that model, layer and scale are those it was trained on"
    elif status == "fail":
        # A larger k is no advice where L0 is too high already.
        larger = "num_latents or k" if figures["l0"].value < settings.l0_range[1] else "num_latents"
        advice = f"train on more tokens, raise {larger}, or try another lr" + (f"; {beaten}" if beaten else "")
    elif beaten:
        advice += ": the threshold says little here; train on more tokens or raise num_latents"
    elif status == "pass":
        advice = f"more tokens or latents may bring it to {good:.0%}"
    return _judged(
        figure, others, f">= {least:g} (good: {good:g})", status, by_construction=False, reason=reason, advice=advice
    )


def _l0(figures: Mapping[str, Estimate], shape: Shape, settings: HealthSettings) -> Judged:
    figure, (low, high) = figures["l0"], settings.l0_range
    share = figure.value / shape.num_latents
    fits = low <= figure.value <= high
    # With TopK the most that L0 can be is k.
    impossible = shape.k is not None and not fits and (shape.k < low or figure.value > high)
    reason = f"{figure.value:.1f} of {shape.num_latents:,} latents are active on a token ({share:.1%})"
    if impossible:
        reason += f"; k = {shape.k} fixes it, so no training can bring it into the range"
    advice = ""
    if figure.value < low:
        # Were k alone raised so far, the code would be hardly sparse.
        advice = "raise k and num_latents" if low / shape.num_latents > HARDLY_SPARSE else "raise k"
    elif figure.value > high:
        advice = "lower k"
    elif share > HARDLY_SPARSE:
        advice = f"L0/F = {share:.0%}: the code is hardly sparse; raise num_latents"
    threshold, status = f"{low:g} to {high:g}", "pass" if fits else "fail"
    return _judged(figure, {}, threshold, status, by_construction=impossible, reason=reason, advice=advice)


def _dead(
    figures: Mapping[str, Estimate], nulls: Mapping[str, dict[str, float]], shape: Shape, settings: HealthSettings
) -> Judged:
    figure, others = figures["dead_below_threshold"], nulls.get("dead_below_threshold", {})
    value = figure.value
    status = "good" if value <= settings.good_dead else "pass" if value <= settings.max_dead else "fail"
    impossible = shape.dead_bound > settings.max_dead
    reason = (
        f"{value:.1%} of the latents fire on less than {shape.dead_rate:.3g} of the {shape.tokens:,} tokens scored "
        f"(--dead_percentage_threshold){_shown(others, '.1%')}"
    )
    advice = (
        ""
        if status == "good"
        else "more tokens or fewer latents leave fewer of them dead, as does a lower --lr at the price of a higher FVU"
    )
    if status == "fail" and any(null > settings.max_dead for null in others.values()):
        reason += "; directions that have learned nothing are over the threshold too"
        advice += "; read it beside the random figure"
    if 0 < shape.tokens * shape.dead_rate < 1:
        reason += "; scored on too few tokens, for so low a rate can't be told from none"
        advice = f"score on at least {math.ceil(1 / shape.dead_rate):,} tokens (--eval_tokens)"
    if impossible:
        reason += f"; at least {shape.dead_bound:.1%} must at this k and num_latents, so the threshold can't be met"
        advice = "lower --dead_percentage_threshold, or lower num_latents or raise k"
    threshold = f"<= {settings.max_dead:g} (good: {settings.good_dead:g})"
    return _judged(figure, others, threshold, status, by_construction=impossible, reason=reason, advice=advice)


def _redundancy(
    figures: Mapping[str, Estimate], nulls: Mapping[str, dict[str, float]], shape: Shape, settings: HealthSettings
) -> Judged:
    figure, others = figures["decoder_redundancy_top100"], nulls.get("decoder_redundancy_top100", {})
    fits = figure.value <= settings.max_redundancy
    impossible = not fits and any(value > settings.max_redundancy for value in others.values())
    reason = f"the 100 most alike pairs of decoder rows have a mean cosine of {figure.value:.3f}{_shown(others, '.3f')}"
    advice = "" if fits else "a lower lr makes fewer near copies"
    if not fits and shape.num_latents >= WIDE * shape.d_in:
        advice = "a few near copies are usual in a wide SAE; fewer latents or a lower lr make fewer of them"
    if impossible:
        reason += (
            f"; {shape.num_latents:,} directions in {shape.d_in} dimensions can hardly be less alike, so the threshold "
            "says nothing here"
        )
        advice = "read it beside the random figure, or set --max_redundancy"
    threshold, status = f"<= {settings.max_redundancy:g}", "pass" if fits else "fail"
    return _judged(figure, others, threshold, status, by_construction=impossible, reason=reason, advice=advice)

"""The verdict: every status, what no training could change, and thresholds that can be set."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from saetrain.errors import SaetrainError
from saetrain.evaluation.bootstrap import Estimate
from saetrain.evaluation.health import MIN_JUDGED_STEPS, HealthSettings, Judgment, SaeProperties, Verdict, judge_metrics

SHAPE = SaeProperties(num_latents=4096, expected_l0=64, min_dead_fraction=0.0, dead_threshold=0.0005, n_tokens=20_000)
HEALTHY = {
    "explained_variance": 0.8,
    "l0": 63.0,
    "dead_below_threshold": 0.05,
    "decoder_redundancy_top100": 0.2,
    "decoder_near_duplicates": 0.0,
}
NULLS: dict[str, float | None] = {
    "explained_variance": 0.4,
    "l0": 64.0,
    "dead_below_threshold": 0.0,
    "decoder_redundancy_top100": 0.15,
    "decoder_near_duplicates": 0.0,
}


def verdict(
    shape: SaeProperties = SHAPE,
    settings: HealthSettings | None = None,
    nulls: dict[str, float | None] | None = None,
    **values: float,
) -> Verdict:
    figures = {name: Estimate(value, value - 0.01, value + 0.01) for name, value in (HEALTHY | values).items()}
    return judge_metrics(figures, beside(NULLS | (nulls or {})), shape, settings or HealthSettings())


def beside(nulls: dict[str, float | None]) -> dict[str, dict[str, float]]:
    return {name: {"random decoder": value} for name, value in nulls.items() if value is not None}


def one(name: str, **options: object) -> Judgment:
    return verdict(**options).judgments[name]  # type: ignore[arg-type]


def test_all_healthy() -> None:
    found = verdict()
    assert str(found) == "4/4"
    assert [judged.status for judged in found.judgments.values()] == ["good", "pass", "good", "pass"]
    assert not any(judged.by_construction for judged in found.judgments.values())
    assert not any(judged.advice for judged in found.judgments.values())


@pytest.mark.parametrize(
    ("value", "status", "advice"),
    [
        (0.7, "good", ""),
        (0.6999, "pass", "more tokens or latents"),
        (0.6, "pass", "more tokens or latents"),
        (0.5999, "fail", "train on more tokens"),
        (0.0, "fail", "train on more tokens"),
        (-0.01, "fail", "worse than predicting the mean"),
        (math.nan, "fail", "check the weights"),
        (-math.inf, "fail", "check the weights"),
    ],
)
def test_explained_variance(value: float, status: str, advice: str) -> None:
    found = one("explained_variance", explained_variance=value)
    assert found.status == status
    assert found.advice.startswith(advice)
    assert bool(found.advice) == bool(advice)
    assert found.is_passing == (status != "fail")
    assert not found.by_construction


def test_an_sae_that_random_directions_match_is_told_so() -> None:
    found = one("explained_variance", explained_variance=0.75, nulls={"explained_variance": 0.75})
    assert found.status == "good", "the threshold is the user's"
    assert "random decoder explains at least as much" in found.advice
    assert found.baselines == {"random decoder": 0.75}
    assert "random decoder" not in one("explained_variance", nulls={"explained_variance": None}).reason


def test_what_pca_explains_too_is_said_whatever_the_status() -> None:
    """And its advice goes with that of L0."""
    for value in (0.5, 0.65, 0.75):
        found = one("explained_variance", explained_variance=value, nulls={"explained_variance": 0.76})
        assert "random decoder explains at least as much with as many values per token" in found.advice
        assert "lower k" not in found.advice
    assert "at least as much" not in one("explained_variance", explained_variance=0.5).advice


@pytest.mark.parametrize(("l0", "raised"), [(64.0, True), (199.0, True), (200.0, False), (300.0, False)])
def test_a_larger_k_is_advised_only_where_l0_may_rise(l0: float, raised: bool) -> None:
    found = one("explained_variance", explained_variance=0.5, l0=l0)
    assert ("or k" in found.advice) == raised
    assert "raise num_latents" in found.advice


@pytest.mark.parametrize(("latents", "advice"), [(128, "raise k and num_latents"), (512, "raise k")])
def test_k_is_raised_with_the_latents_where_the_code_would_be_hardly_sparse(latents: int, advice: str) -> None:
    assert one("l0", l0=8.0, shape=replace(SHAPE, num_latents=latents, expected_l0=8)).advice == advice


def test_dead_latents_name_their_null_and_what_they_were_counted_on() -> None:
    found = one("dead", dead_below_threshold=0.528, nulls={"dead_below_threshold": 0.376})
    assert "52.8% of the latents fire on less than 0.0005 of the 20,000 evaluated tokens" in found.reason
    assert "(random decoder 37.6%)" in found.reason
    assert "random directions are above the threshold too" in found.reason
    assert "compare the share with its random baseline" in found.advice
    assert not found.by_construction, "training may find better directions than chance"
    for value, null in ((0.528, 0.15), (0.15, 0.376)):
        found = one("dead", dead_below_threshold=value, nulls={"dead_below_threshold": null})
        assert "above the threshold" not in found.reason


@pytest.mark.parametrize(("rate", "tokens", "few"), [(0.0005, 1999, True), (0.0005, 2000, False), (0.0, 10, False)])
def test_too_few_tokens_for_a_rate_are_named(rate: float, tokens: int, few: bool) -> None:
    found = one("dead", dead_below_threshold=0.3, shape=replace(SHAPE, dead_threshold=rate, n_tokens=tokens))
    assert ("too few tokens were evaluated" in found.reason) == few
    assert (found.advice == "evaluate on at least 2,000 tokens (--eval_tokens)") == few


@pytest.mark.parametrize(
    ("l0", "k", "status", "impossible", "advice"),
    [
        (20.0, 20, "pass", False, ""),
        (200.0, 200, "pass", False, ""),
        (19.9, 32, "fail", False, "raise k"),
        (19.5, 20, "fail", False, "raise k"),
        (16.0, 16, "n/a", True, "raise k"),
        (256.0, 256, "n/a", True, "lower k"),
        (201.0, None, "fail", False, "lower k"),
        (10.0, None, "fail", False, "raise k"),
    ],
)
def test_l0(l0: float, k: int | None, status: str, impossible: bool, advice: str) -> None:
    found = one("l0", l0=l0, shape=replace(SHAPE, num_latents=40_960, expected_l0=k))
    assert (found.status, found.by_construction) == (status, impossible)
    assert found.advice == advice
    assert (f"L0 is set by k = {k}" in found.reason) == impossible


@pytest.mark.parametrize(("latents", "hardly"), [(1279, True), (1281, False)])
def test_a_code_of_more_than_a_twentieth_is_barely_sparse(latents: int, hardly: bool) -> None:
    found = one("l0", l0=64.0, shape=replace(SHAPE, num_latents=latents))
    assert found.status == "pass"
    assert ("barely sparse" in found.advice) == hardly


@pytest.mark.parametrize(
    ("value", "bound", "status", "impossible"),
    [
        (0.1, 0.0, "good", False),
        (0.1001, 0.0, "pass", False),
        (0.2, 0.2, "pass", False),
        (0.2001, 0.0, "fail", False),
        (0.9, 0.84, "n/a", True),
        (1.0, 1.0, "n/a", True),
    ],
)
def test_dead(value: float, bound: float, status: str, impossible: bool) -> None:
    found = one("dead", dead_below_threshold=value, shape=replace(SHAPE, min_dead_fraction=bound))
    assert (found.status, found.by_construction) == (status, impossible)
    assert found.advice.startswith("lower --dead_percentage_threshold") == impossible
    assert (f"at least {bound:.1%} count as dead after any training" in found.reason) == impossible


@pytest.mark.parametrize(
    ("value", "null", "duplicates", "random_duplicates", "status"),
    [
        (0.7, 0.2, 0.0, 0.0, "pass"),
        (0.7001, 0.2, 0.0, 0.0, "fail"),
        (0.9, 0.45, 0.0, 0.0, "pass"),
        (0.3, 0.2, 0.01, 0.0, "pass"),
        (0.3, 0.2, 0.0101, 0.0, "fail"),
        (0.3, 0.2, 0.3, 0.295, "pass"),
        (0.6, None, 0.0, None, "fail"),
        (math.nan, math.nan, 0.0, math.nan, "pass"),
        (math.nan, 0.2, math.nan, 0.0, "fail"),
    ],
)
def test_redundancy_is_judged_by_its_excess_and_by_near_duplicates(
    value: float, null: float | None, duplicates: float, random_duplicates: float | None, status: str
) -> None:
    found = one(
        "redundancy",
        decoder_redundancy_top100=value,
        decoder_near_duplicates=duplicates,
        nulls={"decoder_redundancy_top100": null, "decoder_near_duplicates": random_duplicates},
    )
    assert (found.status, found.by_construction) == (status, False)
    assert bool(found.advice) == (status == "fail")
    assert ("the older limit of 0.25, which is met, decides nothing" in found.reason) == (value <= 0.25)


SHORT = replace(SHAPE, steps=MIN_JUDGED_STEPS - 1)
LONG = replace(SHAPE, steps=MIN_JUDGED_STEPS)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("explained_variance", {"explained_variance": 0.3}),
        ("l0", {"l0": 300.0}),
        ("dead", {"dead_below_threshold": 0.5}),
        ("redundancy", {"decoder_near_duplicates": 0.5}),
    ],
)
def test_short_runs_get_a_reason_instead_of_a_fail(name: str, values: dict[str, float]) -> None:
    shape = replace(SHORT, expected_l0=None)
    found = verdict(shape, **values)
    assert str(found) == "3/3"
    assert found.judgments[name].status == "n/a"
    assert f"not judged, because {SHORT.steps} steps are too few" in found.judgments[name].reason
    for long in (LONG, SHAPE):
        assert one(name, shape=replace(long, expected_l0=None), **values).status == "fail"


def test_a_short_run_that_passes_is_named_as_short() -> None:
    said = verdict(SHORT).describe_checks()
    assert said.endswith(f"; only {SHORT.steps} steps, more tokens would help")
    assert "steps" not in verdict(LONG).describe_checks()


def test_a_short_run_that_is_worse_than_the_mean_fails() -> None:
    for value in (-0.1, math.nan):
        assert one("explained_variance", shape=SHORT, explained_variance=value).status == "fail"


def test_thresholds_are_those_that_are_set() -> None:
    strict = HealthSettings(
        min_explained_variance=0.85, good_explained_variance=0.9, l0_range=(70.0, 80.0), max_dead=0.04, good_dead=0.01,
        max_redundancy_excess=0.01,
    )  # fmt: skip
    found = verdict(settings=strict)
    assert str(found) == "0/3"
    assert found.judgments["explained_variance"].threshold == ">= 0.85 (good: 0.9)"
    assert found.judgments["l0"].threshold == "70 to 80"
    assert found.judgments["dead"].threshold == "<= 0.04 (good: 0.01)"
    assert found.judgments["redundancy"].threshold == "<= random + 0.01, near duplicates <= 0.01"
    assert found.judgments["l0"].by_construction, "L0 can't exceed k = 64"
    loose = HealthSettings(
        min_explained_variance=-5, good_explained_variance=0, l0_range=(0.0, 1e9), max_dead=1, good_dead=1,
        max_redundancy_excess=1, max_near_duplicates=1,
    )  # fmt: skip
    worst = verdict(settings=loose, explained_variance=-1, l0=0.0, dead_below_threshold=1.0)
    assert [judged.status for judged in worst.judgments.values()] == ["pass", "pass", "good", "pass"]


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"l0_range": (200.0, 20.0)}, "--l0_range 200 20"),
        ({"l0_range": (-1.0, 20.0)}, "--l0_range -1.0: must be at least 0"),
        ({"min_explained_variance": 0.8}, "--min_explained_variance 0.8"),
        ({"good_dead": 0.3}, "--good_dead 0.3"),
        ({"l0_range": (20.0, math.inf)}, "--l0_range inf: must be a finite number"),
        ({"max_dead": math.nan}, "--max_dead nan: must be a finite number"),
        ({"min_explained_variance": -math.inf}, "--min_explained_variance -inf: must be a finite number"),
        (
            {"min_explained_variance": 60},
            "--min_explained_variance 60: must be at most 1; give a fraction, 0.6 instead of 60 %",
        ),
        ({"good_explained_variance": 70}, "--good_explained_variance 70: must be at most 1"),
        ({"max_dead": 20}, "--max_dead 20: must be at most 1; give a fraction"),
        ({"good_dead": -0.1}, "--good_dead -0.1: must be at least 0"),
        ({"max_redundancy": 25}, "--max_redundancy 25: must be at most 1"),
        ({"max_redundancy_excess": 50}, "--max_redundancy_excess 50: must be at most 1"),
        ({"max_near_duplicates": 1.5}, "--max_near_duplicates 1.5: must be at most 1"),
        ({"l0_range": (20.0,)}, "--l0_range: give 2 numbers, smallest and largest; found 1"),
    ],
)
def test_thresholds_that_say_nothing_are_refused(values: dict, flag: str) -> None:
    with pytest.raises(SaetrainError, match=flag):
        HealthSettings(**values)


def test_the_json_has_all_of_it_and_no_nan() -> None:
    broken = {"explained_variance": math.nan, "decoder_redundancy_top100": -math.inf}
    figures = {name: Estimate(value) for name, value in (HEALTHY | broken).items()}
    nulls = beside(NULLS | {"explained_variance": math.nan})
    found = judge_metrics(figures, nulls, SHAPE, HealthSettings()).as_json()
    again = json.loads(json.dumps(found, allow_nan=False))
    assert (again["verdict"], again["passed"], again["of"]) == ("3/4", 3, 4)
    assert set(again["metrics"]) == {"explained_variance", "l0", "dead", "redundancy"}
    assert again["metrics"]["explained_variance"]["value"] is None
    assert again["metrics"]["explained_variance"]["nulls"] == {"random decoder": None}
    assert again["metrics"]["redundancy"]["value"] is None
    schema = json.loads((Path(__file__).parents[3] / "docs" / "final_assessment.schema.json").read_text())
    for judged in again["metrics"].values():
        jsonschema.validate(judged, {"$ref": "#/$defs/judged", "$defs": schema["$defs"]})
    assert again["metrics"]["l0"]["low"] is None
    assert again["metrics"]["l0"]["nulls"] == {}
    assert again["metrics"]["dead"]["nulls"] == {"random decoder": 0.0}

"""Learning rate: schedule, rule of ``--lr auto``, and warnings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from saetrain.optim import (
    AUTO_WEIGHT_DECAY,
    LR_DECAY_SHARE,
    OptimSettings,
    RunSize,
    describe_small_sgd_lr,
    describe_unusual_lr,
    lr_factor,
    recommended_lr,
    resolve_warmup_steps,
)
from saetrain.optim.lr_rule import LR_POWER_K, LR_POWER_LATENTS, LR_POWER_STEPS, LR_POWER_TOKENS, LR_RULE_BASE


def test_weight_decay_comes_with_the_rule_unless_given() -> None:
    assert OptimSettings().effective_weight_decay == 0.0
    assert OptimSettings(lr="auto").effective_weight_decay == AUTO_WEIGHT_DECAY > 0
    assert OptimSettings(lr="auto", weight_decay=0.0).effective_weight_decay == 0.0
    assert OptimSettings(weight_decay=0.02).effective_weight_decay == 0.02


def test_schedule_rises_holds_and_falls_to_nothing() -> None:
    steps, warmup = 100, 10
    factors = [lr_factor(step, steps, warmup) for step in range(steps)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:20] == [1.0] * 10
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert factors[21] < 1
    assert 0 < factors[99] < 0.02, "the last step is small, and not lost"
    assert lr_factor(0, 1, 0) > 0


def test_warmup_is_a_twentieth_of_the_run_at_most_1000() -> None:
    assert [resolve_warmup_steps(OptimSettings(), steps) for steps in (5, 400, 50_000)] == [0, 20, 1000]
    assert resolve_warmup_steps(OptimSettings(lr_warmup_steps=7), 400) == 7


SIZE = RunSize(num_latents=2**14, k=32, tokens_per_step=2048, steps=500)


def test_the_rule_by_hand() -> None:
    assert recommended_lr(RunSize(3072, 32, 1024, 400)) == pytest.approx(0.016)
    assert recommended_lr(RunSize(12288, 64, 4096, 4000)) == pytest.approx(
        0.016 * 4**-0.4 * 2**0.1 * 4**0.25 * 10**-0.2
    )


def test_the_page_has_the_rule_of_the_code() -> None:
    page = (Path(__file__).parents[3] / "docs" / "recipe.md").read_text()
    rule = (
        f"{LR_RULE_BASE:g} · (F/3072)^{LR_POWER_LATENTS:g} · (k/32)^{LR_POWER_K:g} · "
        f"(N/1024)^{LR_POWER_TOKENS:g} · (S/400)^{LR_POWER_STEPS:g}"
    )
    assert rule in page
    assert f"linearly to zero over the last {100 * LR_DECAY_SHARE:.0f} %" in page
    assert f"| weight decay | {AUTO_WEIGHT_DECAY:g} on" in page


def test_the_rule_falls_with_width_and_length_and_rises_with_k() -> None:
    rule = recommended_lr(SIZE)
    assert recommended_lr(replace(SIZE, num_latents=2**16)) < rule < recommended_lr(replace(SIZE, num_latents=2**12))
    assert recommended_lr(replace(SIZE, steps=5000)) < rule < recommended_lr(replace(SIZE, steps=50))
    assert recommended_lr(replace(SIZE, k=16)) < rule < recommended_lr(replace(SIZE, k=64))


@pytest.mark.parametrize(
    ("factor", "said"), [(1.0, None), (2.9, None), (3.1, "3.1 times"), (0.32, "1/3.1 of"), (50.0, "50.0 times")]
)
def test_rates_far_off_the_rule_are_remarked(factor: float, said: str | None) -> None:
    remark = describe_unusual_lr(factor * recommended_lr(SIZE), recommended_lr(SIZE), "a run")
    assert (remark is None) if said is None else (remark is not None and said in remark and "--lr auto" in remark)


def test_sgd_says_what_rates_train() -> None:
    assert "too small for --optimizer sgd" in str(describe_small_sgd_lr(0.001))
    assert describe_small_sgd_lr(1.0) is None

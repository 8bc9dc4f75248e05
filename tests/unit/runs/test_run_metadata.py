"""What a run says at its start and its end about learning rates and about runs that diverged."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saetrain.cli import parse_train
from saetrain.coders import SparseCoder, TopK
from saetrain.errors import DivergedRun
from saetrain.runs.train.metadata import describe_lr_risk, raise_if_diverged
from saetrain.runs.train.plan import SaePlan
from saetrain.types import Site


@pytest.mark.parametrize(
    ("loss_fn", "fvu", "raises"),
    [("mse", 1.0, False), ("mse", math.nan, True), ("kl", 9.0, False), ("kl", math.nan, True)],
)
def test_an_fvu_that_is_not_a_number_counts_as_diverged(loss_fn: str, fvu: float, raises: bool) -> None:
    config = parse_train(["model", "data", "--loss_fn", loss_fn])
    with pytest.raises(DivergedRun, match=r"1 of 2 SAEs .*h\.1: FVU nan") if raises else contextlib.nullcontext():
        raise_if_diverged(Path("run"), config, {"h.0": {"fvu": 0.5}, "h.1": {"fvu": fvu}})


@pytest.mark.parametrize("order", [("h.0", "h.1"), ("h.1", "h.0")])
def test_an_fvu_that_is_not_a_number_is_the_worst(order: tuple[str, str]) -> None:
    metrics = {name: {"fvu": {"h.0": 9.0, "h.1": math.nan}[name]} for name in order}
    with pytest.raises(DivergedRun, match=r"2 of 2 SAEs .* \(h\.1: FVU nan, not a number\)"):
        raise_if_diverged(Path("run"), parse_train(["model", "data"]), metrics)


class RuleWithoutL0(TopK):
    """A coder with a rule for its learning rate, whose L0 training alone decides."""

    expected_l0 = SparseCoder.expected_l0  # type: ignore[assignment]

    def recommended_lr(self, tokens_per_step: int, steps: int) -> float:
        return 0.01


def test_a_numeric_lr_is_compared_with_the_rule_of_a_coder_without_an_l0() -> None:
    resolved = SimpleNamespace(tokens_per_step=4096, steps=1000)
    config = parse_train(["model", "data", "--lr", "5"])
    run: Any = SimpleNamespace(config=config, plans={"h.0": SaePlan(Site.of_sae("h.0"), config)}, resolved=resolved)
    remark = describe_lr_risk(run, "h.0", RuleWithoutL0(8, 64, 4))
    assert remark is not None
    assert "64 latents and 1000 steps of 4096 tokens" in remark

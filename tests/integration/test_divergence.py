"""A run whose SAEs reconstruct worse than the mean is saved, and ends with exit code 3 and one line."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from saetrain.cli import main, parse_train
from saetrain.errors import DivergedRun
from saetrain.runs.train.metadata import raise_if_diverged
from tests.integration.conftest import BASE, Place

pytestmark = pytest.mark.slow


def train(place: Place, *flags: str) -> int:
    words = [place.model, place.text, *BASE.split(), "--save_dir", str(place.folder / "out"), *flags]
    try:
        main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_diverged_run_is_saved_and_exits_with_3(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, "--lr", "1000", "--layers", "0", "1") == DivergedRun.exit_code == 3
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert re.search(r"^saetrain: error: the run diverged: 2 of 2 SAEs .*FVU .* above 1.*--lr auto", errors[0])
    assert len(list((place.folder / "out").rglob("cfg.json"))) == 2


def test_a_run_that_torchrun_would_restart_exits_with_0(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert train(place, "--lr", "1000") == 0
    assert "the run diverged: 1 of 1 SAEs" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert train(place, "--lr", "1000", "--resume") == 3


@pytest.mark.parametrize(("loss_fn", "fvu", "raises"), [("mse", 1.1, True), ("mse", 1.0, False), ("kl", 9.0, False)])
def test_only_reconstruction_runs_with_an_fvu_above_1_diverge(loss_fn: str, fvu: float, raises: bool) -> None:
    config = parse_train(["model", "data", "--loss_fn", loss_fn])
    with pytest.raises(DivergedRun) if raises else contextlib.nullcontext():
        raise_if_diverged(Path("run"), config, {"h.0": {"fvu": 0.5}, "h.1": {"fvu": fvu}})


def test_the_number_of_held_out_tokens_is_the_real_one(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, "--eval_tokens", "10000000") == 0
    printed = "".join(capsys.readouterr())
    assert "10,000,000" not in printed
    announced = re.search(r"evaluating on up to ([\d,]+) held-out", printed)
    scored = re.search(r"^on ([\d,]+) held-out tokens", printed, re.MULTILINE)
    assert announced is not None
    assert scored is not None
    assert announced[1] == scored[1]

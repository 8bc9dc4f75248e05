"""Assessments side by side: what differs is shown, what is missing or broken is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from saetrain.cli import main
from saetrain.config import CompareConfig
from saetrain.runs.assessment import FORMAT
from saetrain.runs.compare import Comparison, compare, read_run, tokens_per_second

LAYER = "encoder.layer.0"


def figure(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "count": 500}


def assessment(explained: float = 0.75, **figures: dict[str, Any]) -> dict[str, Any]:
    entry = {
        "verdict": "3/4",
        "metrics": {"redundancy": figure(0.36)},
        "figures": {
            "explained_variance": figure(explained, explained - 0.1, explained + 0.1),
            "l0": figure(4.0, 4.0, 4.0),
            "dead_below_threshold": figure(0.25),
            "dead_never_fired": figure(0.125),
            **figures,
        },
    }
    judged_on = {"data_set": "text.jsonl", "in_sample": True, "held_out": "documents"}
    return {"format": FORMAT, "judged_on": judged_on, "thresholds": {"max_dead": 0.2}, "saes": {LAYER: entry}}


def make_run(folder: Path, content: dict[str, Any] | None = None, **settings: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "final_assessment.json").write_text(json.dumps(content or assessment()))
    shared = {"model": "m", "k": 4, "lr": 0.001, "auxk_alpha": 0.0, "run_name": folder.name, "save_dir": "out"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**shared, **settings}))
    lines = [{"kind": "train", "tokens_per_second": rate} for rate in (100.0, 300.0)] + [{"kind": "final"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def compared(*runs: str) -> Comparison:
    return compare(CompareConfig(runs=runs))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *words])
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_only_settings_that_differ_are_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = compared(make_run(tmp_path / "a"), make_run(tmp_path / "b", auxk_alpha=0.03125, layers=[0, 1]))
    assert comparison.differing == ["auxk_alpha", "layers"]
    printed = capsys.readouterr().out
    heading = printed.splitlines()[1]
    assert "auxk_alpha" in heading
    assert "layers" in heading
    assert "lr" not in heading
    assert "in all: model m, k 4, lr 0.001" in printed
    row = next(line for line in printed.splitlines() if "0.03125" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "b", LAYER, "0.03125", "0 1", "3/4", "0.75", "4", "0.25", "0.125", "0.36", "150"
    ]  # fmt: skip
    assert "[0.65, 0.85]" in printed


def test_a_table_is_not_folded_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {f"setting_number_{number}": number for number in range(20)}
    compared(make_run(tmp_path / "a"), make_run(tmp_path / "b", **names))
    heading = capsys.readouterr().out.splitlines()[1]
    assert [name for name in names if name not in heading] == []


def test_the_loss_is_shown_where_an_sae_has_it(tmp_path: Path) -> None:
    with_loss = assessment(ce_recovered_zero=figure(0.9, 0.8, 1.0))
    comparison = compared(make_run(tmp_path / "a"), make_run(tmp_path / "b", with_loss))
    assert comparison.figures()[:2] == ["explained_variance", "ce_recovered_zero"]
    assert ["ce_recovered_zero" in row.figures for row in comparison.rows] == [False, True]


def test_a_figure_that_is_not_known_is_left_out(tmp_path: Path) -> None:
    (row,) = read_run(Path(make_run(tmp_path / "a", assessment(l0=figure(None)))), "a")
    assert "l0" not in row.figures


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")
    assert [row.run for row in compared(*runs).rows] == list(runs)


def test_an_sae_without_a_run_has_a_row_too(tmp_path: Path) -> None:
    alone = Path(make_run(tmp_path / "alone"))
    (alone / "config.yaml").unlink()
    (alone / "metrics.jsonl").unlink()
    comparison = compared(make_run(tmp_path / "a"), str(alone))
    assert comparison.differing == []
    assert comparison.rows[1].tokens_per_second is None


def test_files_hold_what_is_printed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", assessment(0.5)), make_run(tmp_path / "b", k=8)]
    main(["compare", *runs, "--out", str(tmp_path / "new" / "table.json")])
    main(["compare", *runs, "--out", str(tmp_path / "table.csv")])
    content = json.loads((tmp_path / "new" / "table.json").read_text())
    assert content["differing_settings"] == ["k"]
    assert [sae["settings"] for sae in content["saes"]] == [{"k": 4}, {"k": 8}]
    assert content["saes"][0]["figures"]["explained_variance"] == {"value": 0.5, "low": 0.4, "high": 0.6}
    assert content["saes"][0]["figures"]["dead_never_fired"] == {"value": 0.125, "low": None, "high": None}
    first, second = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert (first["run"], first["sae"], first["verdict"], first["k"], second["k"]) == ("a", LAYER, "3/4", "4", "8")
    assert (first["explained_variance"], first["explained_variance_high"]) == ("0.5", "0.6")
    assert (first["dead_never_fired_low"], first["tokens_per_second"]) == ("", "150.0")


def test_speed_is_tokens_over_time(tmp_path: Path) -> None:
    """100 tokens at 100 a second and 100 at 300 take 4/3 of a second."""
    make_run(tmp_path / "a")
    assert tokens_per_second(tmp_path / "a" / "metrics.jsonl") == pytest.approx(200 / (4 / 3))


def test_what_spoils_the_comparison_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = assessment()
    other["thresholds"] = {"max_dead": 0.5}
    other["judged_on"]["data_set"] = "other.jsonl"
    compared(make_run(tmp_path / "a"), make_run(tmp_path / "b", other))
    printed = capsys.readouterr().out
    assert "the data sets differ, so the rows are not quite comparable: text.jsonl; other.jsonl" in printed
    assert "the thresholds of the verdict differ" in printed
    assert "the numbers of tokens scored" not in printed


def test_a_run_must_be_named_and_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "RUN is missing" in refused(capsys)
    assert "nowhere: there is no such folder" in refused(capsys, str(tmp_path / "nowhere"))


def test_a_run_without_an_assessment_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    (tmp_path / "a" / "final_assessment.json").unlink()
    assert f"holds no final_assessment.json; `saetrain evaluate {run}` makes one" in refused(capsys, run)
    (tmp_path / "a" / ".saetrain").touch()
    assert "its run is not finished: --resume goes on with it" in refused(capsys, run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "final_assessment.json: is no JSON"),
        ("\xff", "final_assessment.json: is no JSON"),
        ("[]", "should hold a JSON object"),
        (json.dumps({**assessment(), "format": 7}), f"is of format 7, and this version reads {FORMAT}"),
        (json.dumps({"format": FORMAT}), "is not as saetrain writes it (KeyError: 'saes')"),
        (json.dumps({**assessment(), "saes": {LAYER: 3}}), "is not as saetrain writes it"),
        (json.dumps({**assessment(), "saes": {}}), "final_assessment.json: holds no SAE"),
    ],
)
def test_broken_assessments_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    run = make_run(tmp_path / "a")
    (tmp_path / "a" / "final_assessment.json").write_text(content, encoding="latin-1")
    error = refused(capsys, run)
    assert message in error
    assert "makes it anew" in error


def test_broken_neighbours_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text('{"kind": "final"}\n{"kind"\n')
    assert "metrics.jsonl: line 2 is not as saetrain writes it" in refused(capsys, run)
    (tmp_path / "a" / "config.yaml").write_text("- 1\n")
    assert f"error: {run}/config.yaml: should hold lines" in refused(capsys, run)


def test_bad_files_to_write_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    assert "--out table.txt: must end in .json or .csv" in refused(capsys, run, "--out", "table.txt")
    (tmp_path / "file").touch()
    assert "can't be written: " in refused(capsys, run, "--out", str(tmp_path / "file" / "table.csv"))

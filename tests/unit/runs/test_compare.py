"""Assessments side by side: what differs is shown, what is missing or broken is named."""

from __future__ import annotations

import csv
import datetime
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from saetrain.cli import main
from saetrain.config import CompareConfig
from saetrain.runs.compare import Comparison, compare_runs, mean_tokens_per_second, read_run
from saetrain.runs.evaluate.report import FORMAT_VERSION
from saetrain.runs.sae_table import open_console

LAYER = "encoder.layer.0"


def figure(
    value: float | None, low: float | None = None, high: float | None = None, count: int = 500
) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "count": count}


def assessment(explained: float = 0.75, **figures: dict[str, Any]) -> dict[str, Any]:
    entry = {
        "verdict": "3/4",
        "figures": {
            "explained_variance": figure(explained, explained - 0.1, explained + 0.1),
            "l0": figure(4.0, 4.0, 4.0),
            "dead_below_threshold": figure(0.25),
            "decoder_redundancy_top100": figure(0.36),
            **figures,
        },
    }
    judged_on = {"data_set": "text.jsonl", "in_sample": True, "held_out": "documents"}
    return {"format": FORMAT_VERSION, "judged_on": judged_on, "thresholds": {"max_dead": 0.2}, "saes": {LAYER: entry}}


def make_run(folder: Path, content: dict[str, Any] | None = None, **settings: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "final_assessment.json").write_text(json.dumps(content or assessment()))
    shared = {"model": "m", "k": 4, "lr": 0.001, "auxk_alpha": 0.0, "run_name": folder.name, "save_dir": "out"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**shared, **settings}))
    about = {"step": 1, "tokens": 64, "saes": {}}
    lines = [{"kind": "train", **about, "tokens_per_second": rate} for rate in (100.0, 300.0)]
    lines.append({"kind": "final", **about})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def shown(printed: str) -> dict[str, list[str]]:
    """{title of a column: its cells} of the first table that is printed."""
    head, *lines = printed.splitlines()
    titles = re.split(r" {2,}", head.strip())
    rows = list(itertools.takewhile(lambda line: re.search(r"\d/\d *$", line), lines))
    cells = [re.split(r" {2,}", row.strip()) for row in rows]
    return {title: [row[number] for row in cells] for number, title in enumerate(titles)}


def compared(*runs: str) -> Comparison:
    return compare_runs(CompareConfig(runs=runs))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *words])
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_only_settings_that_differ_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparison = compared(
        make_run(tmp_path / "a", layers=[0]), make_run(tmp_path / "b", auxk_alpha=0.03125, layers=[0, 1])
    )
    assert comparison.differing_settings == ["auxk_alpha", "layers"]
    printed = capsys.readouterr().out
    table = shown(printed)
    assert table == {
        "run": ["a", "b"], "auxk_alpha": ["0", "0.03125"], "layers": ["0", "0 1"], "L0": ["4.0"] * 2,
        "dead": ["25.0%"] * 2, "redund.": ["0.360"] * 2, "verdict": ["3/4"] * 2,
    }  # fmt: skip
    assert "all SAEs: SAE encoder.layer.0, model m, k 4, lr 0.001" in printed


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("count", [1, 2, 12])
def test_one_row_per_sae_fits_a_terminal_with_every_figure_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, count: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    names = ("fvu", "ce_recovered_zero", "delta_ce", "dead_below_threshold", "decoder_redundancy_top100")
    runs, values = [], []
    for number in range(count):
        values.append(0.1234 + number / 1000)
        content = assessment(**{name: figure(values[-1]) for name in names}, l0=figure(192.0 + number))
        content["saes"] = {f"{LAYER}.output.dense": content["saes"][LAYER]}
        name = f"data_preprocessing_{number}_auxk_alpha0.03125_lr0.001"
        runs.append(make_run(tmp_path / name, content, k=10 + number, text_column=name))
    compared(*runs)
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    rows = [line for line in printed.splitlines() if line.endswith("3/4")]
    assert len(rows) == count
    for number, (row, value) in enumerate(zip(rows, values, strict=True)):
        figures = [f"{value:.4f}", f"{192 + number:.1f}", *[f"{value:.3f}"] * 2, f"{value:.1%}", f"{value:.3f}", "3/4"]
        assert row.split()[-7:] == figures
    assert ("also different (see --csv): " in printed) == (count > 1)


def test_settings_have_columns_where_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run(tmp_path / f"{number}", k=number, text_column=f"{number}" * 60) for number in (4, 8)]
    monkeypatch.setenv("COLUMNS", "80")
    compared(*runs)
    printed = capsys.readouterr().out
    assert (shown(printed)["k"], "text_column" in shown(printed)) == (["4", "8"], False)
    assert "also different (see --csv): text_column" in printed
    monkeypatch.setenv("COLUMNS", "180")
    compared(*runs)
    assert shown(capsys.readouterr().out)["text_column"] == ["4" * 60, "8" * 60]


@pytest.mark.parametrize(
    ("metric", "order"),
    [("fvu", "bac"), ("dead_below_threshold", "bac"), ("ce_recovered_zero", "abc"), ("explained_variance", "abc")],
)
def test_saes_are_sorted_from_the_best(tmp_path: Path, metric: str, order: str) -> None:
    """Those without the metric come last."""
    for name, value in (("a", 0.6), ("b", 0.3), ("c", None)):
        make_run(tmp_path / name, assessment(**{metric: figure(value)}))
    found = compare_runs(CompareConfig(runs=tuple(str(tmp_path / name) for name in "cab"), sort=metric))
    assert "".join(row.run for row in found.rows) == order


def test_an_unknown_metric_to_sort_by_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, make_run(tmp_path / "a"), "--sort", "fvuu")
    assert "--sort fvuu: no such metric. Did you mean fvu? Allowed: explained_variance, fvu, " in error


def test_a_setting_that_follows_others_is_left_to_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = make_run(tmp_path / "long", max_tokens=100, lr_warmup_steps=10, kernels="native")
    short = make_run(tmp_path / "short", max_tokens=50, lr_warmup_steps=5, kernels="native")
    slow = make_run(tmp_path / "slow", max_tokens=50, lr_warmup_steps=25, kernels="torch")
    main(["compare", long, short, "--out", str(tmp_path / "table.json")])
    printed = capsys.readouterr().out
    assert "lr_warmup_steps" not in shown(printed)
    assert "also different (see --csv): lr_warmup_steps" in printed
    settings = json.loads((tmp_path / "table.json").read_text())["saes"][0]["settings"]
    assert settings == {"max_tokens": 100, "lr_warmup_steps": 10}
    compared(short, slow)
    table = shown(capsys.readouterr().out)
    assert (table["lr_warmup_steps"], table["kernels"]) == (["5", "25"], ["native", "torch"])


def test_scoring_settings_are_counts_of_what_was_scored(tmp_path: Path) -> None:
    fewer = assessment(delta_ce=figure(0.5, count=4064), explained_variance=figure(0.75, count=8000))
    more = assessment(delta_ce=figure(0.5, count=8001), explained_variance=figure(0.75, count=8000))
    other = assessment(
        final_hidden_error=figure(0.5, count=300),
        pooled_cosine=figure(0.9, count=3),
        explained_variance=figure(0.75, count=8000),
    )
    runs = [make_run(tmp_path / "fewer", fewer, eval_tokens=9, max_dead=0.5), make_run(tmp_path / "more", more)]
    comparison = compared(*runs, make_run(tmp_path / "other", other, loss_tokens=1))
    assert comparison.differing_settings == []
    assert [line.split(",")[0] for line in comparison.comparability_remarks()] == [
        "the numbers of tokens on which the model's loss was scored differ"
    ]
    assert comparison.as_json()["saes"][0]["loss_tokens_scored"] == 4064
    assert (
        compared(runs[0], make_run(tmp_path / "none"))
        .comparability_remarks()[0]
        .startswith("the numbers of tokens scored differ")
    )
    assert not compared(runs[0]).comparability_remarks()


def test_of_a_path_the_last_part_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"model": "/models/far/one", "dataset": "org/name", "finetune": "output/x/sae/h.3"}
    two = {"model": "/models/far/two", "dataset": ["/data/a", "/data/b"], "finetune": "output/y/sae/h.3"}
    compared(make_run(tmp_path / "a", **one), make_run(tmp_path / "b", **two))
    table = shown(capsys.readouterr().out)
    assert (table["model"], table["dataset"]) == (["one", "two"], ["org/name", "a b"])
    assert table["finetune"] == ["output/x/sae/h.3", "output/y/sae/h.3"]
    compared(make_run(tmp_path / "c", **one))
    assert "all SAEs: model one, dataset org/name" in capsys.readouterr().out


def test_the_loss_is_shown_where_an_sae_has_it(tmp_path: Path) -> None:
    names = ("ce_recovered_zero", "delta_ce", "kl", "pooled_cosine")
    with_loss = assessment(**{name: figure(0.9, 0.8, 1.0) for name in names})
    comparison = compared(make_run(tmp_path / "a"), make_run(tmp_path / "b", with_loss))
    assert comparison.metric_names()[:5] == ["explained_variance", *names]
    assert ["ce_recovered_zero" in row.metrics for row in comparison.rows] == [False, True]


def test_a_figure_that_is_not_known_is_left_out(tmp_path: Path) -> None:
    (row,) = read_run(Path(make_run(tmp_path / "a", assessment(l0=figure(None)))), "a")
    assert "l0" not in row.metrics


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")
    assert [row.run for row in compared(*runs).rows] == list(runs)


def test_an_sae_without_a_run_has_a_row_too(tmp_path: Path) -> None:
    alone = Path(make_run(tmp_path / "alone"))
    (alone / "config.yaml").unlink()
    (alone / "metrics.jsonl").unlink()
    comparison = compared(make_run(tmp_path / "a"), str(alone))
    assert comparison.differing_settings == []
    assert comparison.rows[1].tokens_per_second is None


def test_files_hold_what_is_printed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", assessment(0.5)), make_run(tmp_path / "b", k=8)]
    main(["compare", *runs, "--out", str(tmp_path / "new" / "table.json")])
    main(["compare", *runs, "--out", str(tmp_path / "table.csv"), "--csv", str(tmp_path / "same")])
    assert (tmp_path / "same").read_text() == (tmp_path / "table.csv").read_text()
    content = json.loads((tmp_path / "new" / "table.json").read_text())
    assert content["differing_settings"] == ["k"]
    assert [sae["settings"] for sae in content["saes"]] == [{"k": 4}, {"k": 8}]
    assert content["saes"][0]["figures"]["explained_variance"] == {"value": 0.5, "low": 0.4, "high": 0.6}
    assert content["saes"][0]["figures"]["dead_below_threshold"] == {"value": 0.25, "low": None, "high": None}
    first, second = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert (first["run"], first["sae"], first["verdict"], first["k"], second["k"]) == ("a", LAYER, "3/4", "4", "8")
    assert (first["explained_variance"], first["explained_variance_high"]) == ("0.5", "0.6")
    assert (first["tokens_scored"], first["loss_tokens_scored"]) == ("500", "")
    assert (first["dead_below_threshold_low"], first["tokens_per_second"]) == ("", "150.0")


def test_speed_is_tokens_over_time(tmp_path: Path) -> None:
    """100 tokens at 100 a second and 100 at 300 take 4/3 of a second."""
    make_run(tmp_path / "a")
    assert mean_tokens_per_second(tmp_path / "a" / "metrics.jsonl") == pytest.approx(200 / (4 / 3))


def test_what_spoils_the_comparison_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = assessment()
    other["thresholds"] = {"max_dead": 0.5}
    other["judged_on"]["data_set"] = "other.jsonl"
    compared(make_run(tmp_path / "a"), make_run(tmp_path / "b", other))
    printed = " ".join(capsys.readouterr().out.split())
    assert "the data sets differ, so the SAEs are only partly comparable: text.jsonl; other.jsonl" in printed
    assert "the thresholds of the verdict differ" in printed
    assert "the numbers of tokens scored" not in printed


def test_a_run_must_be_named_and_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "RUN is missing" in refused(capsys)
    assert "nowhere: there is no such folder" in refused(capsys, str(tmp_path / "nowhere"))


def test_files_among_the_runs_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "comparison.json"
    table.touch()
    comparison = compared(make_run(tmp_path / "a"), str(table))
    assert [row.run for row in comparison.rows] == ["a"]
    assert f"{table}: is a file and not a run directory, so it is skipped" in capsys.readouterr().err
    assert "comparison.json: is a file; pass run directories" in refused(capsys, str(table))


def test_a_run_without_an_assessment_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    (tmp_path / "a" / "final_assessment.json").unlink()
    assert "final_assessment.json; it is neither a run nor the folder of an SAE" in refused(capsys, run)
    (tmp_path / "a" / "cfg.json").write_text("{}")
    assert f"contains no final_assessment.json; run `saetrain evaluate {run}` to create it" in refused(capsys, run)
    (tmp_path / "a" / ".saetrain").touch()
    assert "its run is not finished: continue it with --resume" in refused(capsys, run)


def test_flags_of_one_architecture_are_not_compared_with_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_run(tmp_path / "a", layers=[0], architecture="topk")
    second = make_run(tmp_path / "b", layers=[1], architecture="jumprelu")
    settings = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    del settings["auxk_alpha"]
    (tmp_path / "b" / "config.yaml").write_text(yaml.safe_dump({**settings, "bandwidth": 0.1}))
    assert compared(first, second).shown_settings() == ["architecture", "layers"]
    assert list(shown(capsys.readouterr().out))[:3] == ["run", "architecture", "layers"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "final_assessment.json: is not valid JSON"),
        ("\xff", "final_assessment.json: line 1 is not UTF-8"),
        ("[]", "must contain a JSON object"),
        (json.dumps({**assessment(), "format": 7}), f"has format 7, but this version reads {FORMAT_VERSION}"),
        (json.dumps({"format": FORMAT_VERSION}), "is not in saetrain's format (KeyError: 'saes')"),
        (json.dumps({**assessment(), "saes": {LAYER: 3}}), "is not in saetrain's format"),
        (json.dumps(assessment(l0=figure("abc"))), "is not in saetrain's format (ValueError"),  # type: ignore[arg-type]
        (json.dumps(assessment()).replace('"3/4"', "null"), "verdict: found None, must be a string"),
        (json.dumps({**assessment(), "saes": {}}), "final_assessment.json: contains no SAE"),
    ],
)
def test_broken_assessments_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    run = make_run(tmp_path / "a")
    (tmp_path / "a" / "final_assessment.json").write_text(content, encoding="latin-1")
    error = refused(capsys, run)
    assert message in error
    assert "to create it again" in error


LINE = '{"kind": "final", "step": 1, "tokens": 64, "saes": {}}'


def test_broken_neighbours_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text(f'{LINE}\n{{"kind"\n')
    assert "metrics.jsonl: line 2 is invalid" in refused(capsys, run)
    (tmp_path / "a" / "config.yaml").write_text("- 1\n")
    assert f"error: {run}/config.yaml: must contain lines" in refused(capsys, run)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "fifo").replace(tmp_path / "a" / "metrics.jsonl")
    (tmp_path / "a" / "config.yaml").unlink()
    assert "metrics.jsonl: is not a regular file" in refused(capsys, run)


def test_settings_of_any_kind_are_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key is no markup of the table, and JSON has no dates."""
    odd = {"[link=x]lr[/link]": 1, "[/x]": 2, "day": datetime.date(2026, 11, 30), "far": float("inf")}
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", **odd)]
    main(["compare", *runs, "--out", str(tmp_path / "t.json")])
    found = json.loads((tmp_path / "t.json").read_text())["saes"][1]["settings"]
    assert found == {"[link=x]lr[/link]": 1, "[/x]": 2, "day": "2026-11-30", "far": None}
    assert "[link=x]lr[/link]" in capsys.readouterr().out


def test_bad_files_to_write_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    assert "--out table.txt: must end in .json or .csv" in refused(capsys, run, "--out", "table.txt")
    (tmp_path / "file").touch()
    for flag in ("--out", "--csv"):
        assert f"{flag} {tmp_path / 'file' / 'table.csv'}: can't be written: " in refused(
            capsys, run, flag, str(tmp_path / "file" / "table.csv")
        )


def test_a_simple_terminal_has_the_width_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("COLUMNS", "150"), ("TERM", "dumb"), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    assert open_console().width == 150

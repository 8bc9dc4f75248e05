"""Which texts ``saetrain evaluate`` scores on, what it says of them, and what it takes over from the run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from saetrain.cli import main
from tests.conftest import python_topics
from tests.integration.evaluate.conftest import QUICK, SIZES, evaluate, refused, write_texts

UNCHECKED = "not checked against the training text"
HEALTH = "--l0_range 1 20 --max_dead 0.97 --bootstrap 7 --loss_tokens 1000000 --fit_tokens 500"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Chapters that no SAE was trained on."""
    return write_texts(tmp_path_factory.mktemp("other") / "other.jsonl", python_topics()[-15:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of three splits."""
    there = tmp_path_factory.mktemp("data") / "texts"
    there.mkdir()
    topics = python_topics()
    parts = {"train": topics[:-35], "validation": topics[-35:-25], "test": topics[-25:-15]}
    for split, texts in parts.items():
        write_texts(there / f"{split}.jsonl", texts)
    return str(there)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: str, folder: str) -> Path:
    """A run with an assessment of its own settings, asked for more loss tokens than its text has."""
    return train(tmp_path_factory.mktemp("run"), tiny_gpt2, folder, "--layers", "2", *HEALTH.split())


def train(out: Path, model: str, text: str, *words: str) -> Path:
    main([model, text, *SIZES.split(), *words, "--save_dir", str(out), "--run_name", "run"])
    return out / "run"


def test_of_a_named_data_set_only_the_rows_that_were_trained_on_are_not_scored(
    run: Path, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = evaluate(run, tmp_path / "alone", "--dataset", folder)
    assert sorted(alone) == ["final_assessment", "texts"]
    said = capsys.readouterr().err
    assert f"--dataset {folder}: the SAE was trained on its split 'train', so it is scored once" in said
    assert "as asked" not in said
    both = evaluate(run, tmp_path / "both", "--dataset", folder, "--split", "test")
    assert (both["texts"]["in_sample"], both["texts_2"]["in_sample"]) == (True, False)
    assert both["texts_2"]["held_out"].startswith("split 'test'")
    without = (str(run), "--in_sample", "false", "--dataset", folder)
    for words in (without, (*without, "--split", "train")):
        assert "choose another split with --split" in refused(capsys, *words)
    apart = evaluate(run, tmp_path / "apart", *without[1:], "--split", "test")["texts"]
    assert apart["held_out"] == both["texts_2"]["held_out"]


def test_a_column_alone_does_not_change_the_split(run: Path, folder: str, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "validation.jsonl").unlink()
    found = evaluate(run, tmp_path, "--dataset", str(copy), "--text_column", "text")
    assert found["copy"]["held_out"].startswith("split 'test'")


def test_what_could_not_be_checked_against_the_training_text_says_so(
    tiny_gpt2: str, folder: str, other: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    own = train(tmp_path / "own", tiny_gpt2, str(copy), "--layers", "1", "--assess", "false")
    stream = train(tmp_path / "stream", tiny_gpt2, str(copy), "--layers", "1", "--assess", "false", "--streaming")
    words = ("--dataset", other, "--in_sample", "false")
    assert UNCHECKED not in evaluate(own, tmp_path / "a", *words)["other"]["held_out"]
    assert UNCHECKED in evaluate(stream, tmp_path / "b", *words)["other"]["held_out"]
    write_texts(copy / "train.jsonl", python_topics()[:-40])
    changed = evaluate(own, tmp_path / "c", *words)
    assert UNCHECKED in changed["other"]["held_out"]
    assert UNCHECKED in changed["final_assessment"]["judged_on"]["held_out"]


def test_a_foreign_saes_training_text_is_not_read_in_vain(
    run: Path, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "sae" / "h.2", tmp_path / "sae")
    (tmp_path / "sae" / "sae.safetensors").unlink()
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    del config["saetrain"]
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))

    def never(*values: Any) -> None:
        raise AssertionError("the training text is read")

    monkeypatch.setattr("saetrain.runs.evaluate.texts.load_text", never)
    words = ("--dataset", other, "--in_sample", "false")
    found = evaluate(tmp_path / "sae", tmp_path / "out", *words)["other"]
    assert UNCHECKED in found["held_out"]
    assert found["saes"]["h.2"]["figures"]["l0"]["count"] >= 800
    capsys.readouterr()
    # Of the 36,000 tokens half go to the nulls.
    said = refused(capsys, str(tmp_path / "sae"), *words, "--eval_tokens", "25000", "--fit_tokens", "1000000")
    assert "tokens to score on, because the training text is not available" in said


def test_loss_tokens_that_a_data_set_does_not_have_are_refused(
    run: Path, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, str(run), *QUICK.split(), "--dataset", other, "--loss_tokens", "9999999")
    assert re.search(r"--loss_tokens 9999999: only [0-9,]+ tokens of data set \S+ are scored", said)
    assert "activations" not in said, "it is refused before anything is scored"


def test_a_run_scores_as_many_loss_tokens_as_there_are(run: Path) -> None:
    found = json.loads((run / "evaluation" / "texts.json").read_text())
    assert 0 < found["saes"]["h.2"]["figures"]["ce_clean"]["count"] < 1_000_000


def test_the_runs_own_settings_stand_where_no_flag_is_given(run: Path, tmp_path: Path) -> None:
    first = json.loads((run / "final_assessment.json").read_text())
    words = ["evaluate", str(run), "--out", str(tmp_path), "--eval_tokens", "800"]
    main(words)
    again = json.loads((tmp_path / "final_assessment.json").read_text())
    assert again["thresholds"] == first["thresholds"]
    assert (again["thresholds"]["l0_range"], again["thresholds"]["max_dead"]) == ([1, 20], 0.97)
    settings = json.loads((tmp_path / "evaluation" / "texts.json").read_text())["settings"]
    assert (settings["bootstrap"], settings["fit_tokens"]) == (7, 500)
    # 0.95 is above what --max_dead is without the run; PATH may stand behind the flags too.
    main(["evaluate", *words[2:], "--bootstrap", "3", str(run), "--l0_range", "2", "30"])
    changed = json.loads((tmp_path / "final_assessment.json").read_text())
    assert changed["thresholds"] == {**first["thresholds"], "l0_range": [2, 30]}
    main([*words, "--good_dead", "0.95"])
    changed = json.loads((tmp_path / "final_assessment.json").read_text())
    assert changed["thresholds"] == {**first["thresholds"], "good_dead": 0.95}


def test_another_length_of_an_encoders_sequences(
    tiny_bert: str, folder: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(tmp_path, tiny_bert, folder, "--layers", "1", "--assess", "false")
    said = refused(capsys, str(path), "--ctx_len", "16")
    assert "--ctx_len 16: the training text was cut into sequences of 32 tokens" in said
    assert "changed" not in said
    found = evaluate(path, tmp_path / "out", "--dataset", other, "--in_sample", "false", "--ctx_len", "16")
    assert UNCHECKED not in found["other"]["held_out"]
    assert "changed" not in capsys.readouterr().err


def test_rows_that_cannot_be_read_are_refused_or_left_out(
    run: Path, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(Path(other).read_text() + '{"text": "no end\n')
    assert "--skip_bad_rows skips such rows" in refused(capsys, str(run), "--dataset", str(bad))
    found = evaluate(run, tmp_path / "out", "--dataset", str(bad), "--skip_bad_rows")
    assert found["bad"]["saes"]["h.2"]["documents"] > 1
    assert "skipped 1 bad rows of 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("--dead_percentage_threshold 7.0", "--dead_percentage_threshold 7.0: must be at most 1; give a fraction"),
        ("--dead_percentage_threshold nan", "--dead_percentage_threshold nan: must be a finite number"),
        (f"--eval_seed {2**64}", f"--eval_seed {2**64}: must be at most 4294967295"),
        ("--l0_range 20 inf", "--l0_range inf: must be a finite number"),
        ("--max_dead nan", "--max_dead nan: must be a finite number"),
    ],
)
def test_numbers_out_of_range_are_refused(
    words: tuple[str, str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, said = words
    assert said in refused(capsys, str(run), *flags.split())


def test_the_figures_are_shown_though_they_cannot_be_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), *QUICK.split(), "--out", str(tmp_path / "file")])
    assert "checks pass" in capsys.readouterr().out


def test_as_many_tokens_as_the_run_took_where_no_flag_is_given(run: Path, tmp_path: Path) -> None:
    first = json.loads((run / "evaluation" / "texts.json").read_text())
    moved = shutil.copytree(run / "sae" / "h.2", tmp_path / "moved" / "h.2")
    for path, out in ((run, tmp_path / "a"), (moved, tmp_path / "b")):
        main(["evaluate", str(path), "--out", str(out), *QUICK.split()[2:]])
        again = json.loads((out / "evaluation" / "texts.json").read_text())
        old, new = (found["saes"]["h.2"]["figures"]["fvu"] for found in (first, again))
        assert (new["count"], new["value"]) == (old["count"], pytest.approx(old["value"]))
        assert 1500 <= new["count"] < 1600


def test_a_single_token_is_not_scored(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_texts(tmp_path / "short.jsonl", ["Zq"])
    said = refused(capsys, str(run), *QUICK.split()[2:], "--dataset", text)
    assert f"data set {text}: has 1 tokens to score on (split 'train'); at least 2 are needed" in said


def test_what_has_moved_says_how_to_go_on(
    tiny_gpt2: str, folder: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, model = Path(shutil.copytree(folder, tmp_path / "text")), Path(shutil.copytree(tiny_gpt2, tmp_path / "model"))
    path = train(tmp_path, str(model), str(text), "--layers", "1", "--assess", "false")
    sae = path / "sae" / "h.1"
    text.rename(tmp_path / "text2")
    said = refused(capsys, str(path), *QUICK.split())
    assert f"(the files in {sae} name {text} as the training text; pass --dataset and --in_sample false to" in said
    evaluate(path, tmp_path / "a", "--dataset", other, "--in_sample", "false")
    model.rename(tmp_path / "model2")
    words = ("--dataset", other, "--in_sample", "false")
    said = refused(capsys, str(path), *words)
    assert "no such file or folder" in said
    assert f"(the files in {sae} name this model; if it has moved, pass --model)" in said
    said = refused(capsys, str(path), *words, "--model", str(model))
    assert "name this model" not in said
    evaluate(path, tmp_path / "b", *words, "--model", str(tmp_path / "model2"))

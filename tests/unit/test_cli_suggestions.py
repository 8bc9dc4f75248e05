"""A misspelled command, a run instead of a model, and an argument too many are named with what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from saetrain.cli import main


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("evaluat", "evaluate"),
        ("trian", "train"),
        ("explor", "explore"),
        ("featuers", "features"),
        ("comapre", "compare"),
    ],
)
def test_a_misspelled_command_is_named(capsys: pytest.CaptureFixture[str], word: str, meant: str) -> None:
    expected = f"saetrain: error: {word}: no such command or local model. Did you mean saetrain {meant}?"
    assert refused(capsys, word, "output/run") == expected


def test_a_folder_with_the_name_of_a_command_is_a_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trian").mkdir()
    assert "DATASET is missing" in refused(capsys, "trian")


def test_train_may_be_written_before_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "MODEL is missing" in refused(capsys, "train", "--k", "3")
    assert "DATASET is missing" in refused(capsys, "train", "gpt2")


def test_a_run_is_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / ".saetrain").touch()
    assert f"{tmp_path}: is a run directory; saetrain evaluate, report" in refused(capsys, str(tmp_path))


def test_an_argument_too_many_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: b: one argument too many ('saetrain evaluate --help'" in refused(capsys, "evaluate", "a", "b")

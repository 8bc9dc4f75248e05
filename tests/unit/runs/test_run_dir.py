"""The default name of a run directory is one that a file system can have."""

from __future__ import annotations

from pathlib import Path

import pytest

import saetrain
from saetrain.cli import parse_command, parse_train
from saetrain.config import FeaturesConfig
from saetrain.errors import SaetrainError
from saetrain.runs.run_dir import resolve_run_dir
from saetrain.runs.run_lock import lock_run_dir


def default_dir(folder: Path, *hookpoints: str) -> Path:
    return resolve_run_dir(parse_train(["model", "data", "--save_dir", str(folder), "--hookpoints", *hookpoints]))


def test_the_default_name_is_shortened_to_what_a_file_system_allows(tmp_path: Path) -> None:
    assert default_dir(tmp_path, "a" * 200).name == f"model_{'a' * 200}_k192_x32"
    found = [default_dir(tmp_path, letter * 200, "é" * 100) for letter in "ab"]
    assert found[0] != found[1]
    for directory in found:
        with lock_run_dir(directory):
            assert directory.is_dir()


def test_a_run_directory_whose_name_is_too_long_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(SaetrainError, match=r"can't write to .*: File name too long"),
        lock_run_dir(tmp_path / ("a" * 300)),
    ):
        pytest.fail("it has a lock")


@pytest.mark.parametrize("path", ["a" * 5000, "a/" * 2500])
def test_a_path_that_is_too_long_is_refused(path: str) -> None:
    with pytest.raises(SaetrainError, match="is too long"):
        parse_command(FeaturesConfig, "features", [path])
    with pytest.raises(SaetrainError, match="is too long"):
        saetrain.load(path)

"""A file that the user may not read is named in one line."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from tests.processes import ForkedCommand, finish

NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can become another user")
@pytest.mark.parametrize(
    "words",
    ["evaluate {}/run", "compare {}/run", "report {}/run", "tokenize {}/model {}/text.txt {}/out", "features {}/run"],
)
def test_a_folder_without_permission_is_named(tmp_path: Path, words: str) -> None:
    (tmp_path / "run").mkdir()
    tmp_path.chmod(0o700)
    command = [word.format(tmp_path) for word in words.split()]
    output = finish(ForkedCommand(command, {"HOME": "/nonexistent"}, prepare=partial(os.setuid, NOBODY)), code=2)
    (line,) = [line for line in output.splitlines() if "error:" in line]
    assert line.startswith(f"saetrain: error: {tmp_path}"), line
    assert line.endswith("Permission denied")
    assert "Traceback" not in output

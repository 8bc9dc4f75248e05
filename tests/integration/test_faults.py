"""Disks that fill and processes that die in the middle of a save."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.integration.conftest import limit_file_size
from tests.integration.test_resume import SETTINGS, fingerprint, start
from tests.processes import ForkedCommand, finish

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The faults, to be preloaded."""
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", str(HERE / "faults.c"), "-o", str(path), "-ldl"], check=True)
    return path


def test_every_system_call_of_a_save_may_fail_or_be_the_last(library: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HERE / "fault_driver.py"), str(library), str(tmp_path)],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("resumable") == 4


@pytest.mark.parametrize("stride", [8, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("before", "faults"),
    [
        ("nothing", ["killed"]),
        ("nothing", ["full", "once"]),
        ("damaged checkpoint", ["killed", "full"]),
        ("other run", ["killed", "full"]),
        ("no checkpoints", ["killed", "full"]),
    ],
)
def test_every_system_call_of_a_run_may_fail_or_be_the_last(
    before: str, faults: list[str], stride: int, library: Path, tmp_path: Path, tiny_bert: str, topics: list[str]
) -> None:
    """A run of 8 steps and 3 checkpoints is forked once for each system call in its folder, and meets a fault there.

    It is killed there, or the disk is full from then on (both at every call but those inside the second checkpoint's
    folder, which are the third's again; of a write half is done), or the call alone fails (renames, unlink, rmdir,
    mkdir). Where the folder holds something before, the calls are those of the start, for behind it the run is the
    same. Out of reach is the rename inside safetensors, which goes past the C library. Of the writes, each eighth is
    taken; `make test-soak` takes all.
    """
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": topic[:1500]}) + "\n" for topic in topics[:8]))
    arguments = [str(library), str(tmp_path), tiny_bert, str(text), before, str(stride), *faults]
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.run_fault_driver", *arguments],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"over {before}\n") == len(faults)


def test_a_full_disk_ends_the_run_with_a_message_and_resume_goes_on(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    words = [tiny_bert, topics_jsonl, *SETTINGS.split(), "--log_every", "1"]
    finish(start(tmp_path, "whole", words))
    # The text is tokenized already, so only the run's own files meet the limit.
    output_words = ["--save_dir", str(tmp_path), "--run_name", "run", "--num_latents", "512"]
    printed = finish(ForkedCommand([*words, *output_words], prepare=partial(limit_file_size, 60_000)), 2)
    assert "saetrain: error: writing to" in printed
    assert "Traceback" not in printed
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))
    finish(start(tmp_path, "run", [*words, "--resume"]))
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")

"""Disks that fill and processes that die in the middle of a save, or of a write to a cache."""

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


CASES = ["nothing:killed,full,once", "damaged checkpoint:killed,full", "other run:killed,full"]
CASES += ["no checkpoints:killed,full"]
"""What the folder contains before the run, and the faults."""


@pytest.mark.parametrize(
    ("stride", "cases"),
    [(16, CASES), *(pytest.param(1, [case], marks=pytest.mark.soak, id=case) for case in CASES)],
)
def test_every_system_call_of_a_run_may_fail_or_be_the_last(
    stride: int, cases: list[str], library: Path, tmp_path: Path, tiny_bert: str, topics: list[str]
) -> None:
    """A run of 8 steps and 3 checkpoints is forked once for each system call in its folder, and meets a fault there.

    It is killed there, or the disk is full from then on (both at every call but those inside the second checkpoint's
    folder, which are the third's again; of a write half is done), or the call alone fails (renames, unlink, rmdir,
    mkdir). Where the folder holds something before, the calls are those of the start, for behind it the run is the
    same. Out of reach is the rename inside safetensors, which goes past the C library. A part of the calls is taken,
    another one for each fault; `make test-soak` takes all.
    """
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": topic[:1500]}) + "\n" for topic in topics[:8]))
    arguments = [str(library), str(tmp_path), tiny_bert, str(text), str(stride), *cases]
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.run_fault_driver", *arguments],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" calls over ") == sum(case.count(",") + 1 for case in cases)


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.soak)])
def test_every_system_call_of_a_cache_may_fail_or_be_the_last(
    stride: int, library: Path, tmp_path: Path, tiny_bert: str
) -> None:
    """Cached tokens, token folders and the cached C++ library are whole or are made again."""
    done = subprocess.run(
        [sys.executable, str(HERE / "cache_fault_driver.py"), str(library), str(tmp_path), tiny_bert, str(stride)],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" calls\n") == 9


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

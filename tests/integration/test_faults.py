"""Disks that fill and processes that die in the middle of a save."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from tests.integration.test_resume import SETTINGS, fingerprint, finish, start

HERE = Path(__file__).parent


def test_every_system_call_of_a_save_may_fail_or_be_the_last(tmp_path: Path) -> None:
    library = tmp_path / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O1", str(HERE / "faults.c"), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, str(HERE / "fault_driver.py"), str(library), str(tmp_path)],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("resumable") == 4


def small_files() -> None:
    """Every file that grows over 60 kB fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_full_disk_ends_the_run_with_a_message_and_resume_goes_on(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    words = [tiny_bert, topics_jsonl, *SETTINGS.split(), "--log_every", "1"]
    finish(start(tmp_path, "whole", words))
    # Tokenized before, so that only the run's own files meet the limit.
    command = [sys.executable, "-m", "saetrain", *words, "--save_dir", str(tmp_path), "--run_name", "run"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--num_latents", "512"], env=env, capture_output=True, text=True, check=False, preexec_fn=small_files
    )
    assert done.returncode == 2, done.stderr
    assert "saetrain: error: writing to" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))
    finish(start(tmp_path, "run", [*words, "--resume"]))
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")

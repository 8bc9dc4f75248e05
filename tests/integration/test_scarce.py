"""What a machine may lack: room on the disk, a cache, memory, an extra; each is named, with what to do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saetrain.cli import main
from tests.integration.conftest import BASE, Place, files_up_to


def test_a_disk_that_fills_while_tokenizing_is_named(place: Place) -> None:
    # Of more bytes in tokens than in text, so that reading the text is not what fails.
    Path(place.text).write_text((json.dumps({"text": "a,b;c." * 200}) + "\n") * 1000)
    out = place.folder / "out"
    done = subprocess.run(
        [sys.executable, "-m", "saetrain", place.model, place.text, *BASE.split(), "--save_dir", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_DATASETS_CACHE": str(place.folder / "cache")},
        preexec_fn=files_up_to(1_800_000),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search("the tokens can't be written to .*cache.*; free disk space there", done.stderr), done.stderr
    assert not out.exists()


def test_a_cache_that_cannot_be_made_is_named(place: Place) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "saetrain", place.model, place.text, *BASE.split(), "--save_dir", str(place.folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_DATASETS_CACHE": place.text},
    )
    assert done.returncode == 2, done.stderr
    assert "the variable HF_DATASETS_CACHE names another folder" in done.stderr


def test_missing_extras_are_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    """With the packages hidden as if they were not installed."""
    code = (
        "import importlib.util, sys\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n in ('wandb', 'tensorboard') else find(n, *a)\n"
        "from saetrain.cli import main\nmain(sys.argv[1:])"
    )
    for flag, extra in (("--log_to_wandb", "wandb"), ("--log_to_tensorboard", "tensorboard")):
        command = [sys.executable, "-c", code, "no-model", "no-text", flag, "true", "--save_dir", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert f"pip install 'saetrain[{extra}]'" in done.stderr


def test_force_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("saetrain.runs.train.memory.available_memory_bytes", lambda device: 1000)
    words = [place.model, place.text, *BASE.split(), "--save_dir", str(place.folder / "out")]
    with pytest.raises(SystemExit):
        main(words)
    assert "need about" in capsys.readouterr().err
    main([*words, "--force"])


LIMITED = """
import resource, sys, torch
import saetrain.runs.train.builders as build
from saetrain.cli import main
torch.set_num_threads(1)
measure = build.measure_normalizers
def limited(run):
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[1]) * 2**20,) * 2)
    return measure(run)
build.measure_normalizers = limited
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("mebibytes", "words", "advice"),
    [
        (
            400,
            "--batch_size 64 --max_tokens 4096 --num_latents 100000 --k 4 --kernels reference",
            "lower --batch_size from 64 to 32",
        ),
        (
            90,
            "--model_batch_tokens 4000000 --buffer_tokens 40000000 --max_tokens 4000000 --ctx_len 128",
            "--model_batch_tokens from",
        ),
    ],
)
def test_out_of_memory_says_what_to_lower(mebibytes: int, words: str, advice: str, place: Place) -> None:
    """With a real limit on what the process may take once model and text are there."""
    base = [place.model, place.text, *BASE.split(), "--save_dir", str(place.folder / "out"), "--force"]
    command = [sys.executable, "-c", LIMITED, str(mebibytes), *base, *words.split()]
    done = subprocess.run(
        # Each thread's own arena would take more of the limit than the run does.
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "out of memory" in done.stderr
    assert advice in done.stderr, done.stderr[-1000:]

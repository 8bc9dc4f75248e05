"""What a machine may lack: room on the disk, a cache, memory, an extra; each is named, with what to do."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from saetrain.cli import main
from tests.integration.conftest import BASE, Place, limit_file_size
from tests.processes import ForkedCommand, finish


def test_a_disk_that_fills_while_tokenizing_is_named(place: Place) -> None:
    # Of more bytes in tokens than in text, so that reading the text is not what fails.
    Path(place.text).write_text((json.dumps({"text": "a,b;c." * 200}) + "\n") * 1000)
    out = place.folder / "out"
    process = ForkedCommand(
        [place.model, place.text, *BASE.split(), "--save_dir", str(out)],
        {"HF_DATASETS_CACHE": str(place.folder / "cache")},
        prepare=partial(limit_file_size, 1_800_000),
    )
    printed = finish(process, 2)
    assert "Traceback" not in printed
    assert re.search("the tokens can't be written to .*cache.*; free disk space there", printed), printed
    assert not out.exists()


def test_a_cache_that_cannot_be_made_is_named(place: Place) -> None:
    words = [place.model, place.text, *BASE.split(), "--save_dir", str(place.folder)]
    printed = finish(ForkedCommand(words, {"HF_DATASETS_CACHE": place.text}), 2)
    assert "choose another folder with the environment variable HF_DATASETS_CACHE" in printed


def hide_extras() -> None:
    """Hide the packages of the extras as if they were not installed."""
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name in ("wandb", "tensorboard") else find(name, *rest)


@pytest.mark.parametrize(("flag", "extra"), [("--log_to_wandb", "wandb"), ("--log_to_tensorboard", "tensorboard")])
def test_missing_extras_are_named_before_the_model_is_loaded(flag: str, extra: str, tmp_path: Path) -> None:
    words = ["no-model", "no-text", flag, "true", "--save_dir", str(tmp_path)]
    printed = finish(ForkedCommand(words, prepare=hide_extras), 2)
    assert f"pip install 'saetrain[{extra}]'" in printed


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
            "--batch_size 64 --max_tokens 4096 --num_latents 100000 --k 4 --architecture standard",
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

"""Which kernels a run takes, what it says of them, and what happens without a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from saetrain.cli import main
from saetrain.ops.cpu_features import has_fast_bf16

BASE = "--k 4 --num_latents 64 --batch_size 2 --ctx_len 32 --eval_tokens 500 --max_tokens 640 --buffer_tokens 256"
BASE += " --assess false"


def about(out: Path) -> dict[str, Any]:
    (path,) = out.glob("*/sae/*/cfg.json")
    return dict(json.loads(path.read_text())["saetrain"])


def without_compiler(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line where no compiler works and none of its libraries are cached."""
    env = {**os.environ, "CXX": "false", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "saetrain", *words, *BASE.split(), "--save_dir", str(tmp_path / "out")]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_auto_takes_the_fastest_and_says_so(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([tiny_bert, topics_jsonl, *BASE.split(), "--save_dir", str(tmp_path)])
    dtype = "bfloat16" if has_fast_bf16(torch.device("cpu")) else "float32"
    assert f"kernels: native, products in {dtype}" in capsys.readouterr().err
    assert (about(tmp_path)["kernels"], about(tmp_path)["compute_dtype"]) == ("native", dtype)


def test_without_a_compiler_pytorch_s_are_taken_and_it_is_said(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    done = without_compiler(tmp_path, tiny_bert, topics_jsonl)
    assert done.returncode == 0, done.stderr
    said = "--kernels auto: the C++ kernels are not used: they can't be built: "
    said += "the compiler false (named by CXX) can't be run"
    assert done.stderr.count(said) == 1
    assert about(tmp_path / "out")["kernels"] == "torch"
    done = without_compiler(tmp_path, tiny_bert, topics_jsonl, "--kernels", "native", "--run_name", "other")
    assert done.returncode == 2
    assert "saetrain: error: --kernels native: they can't be built" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_was_built_is_used_without_a_compiler(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    words = [sys.executable, "-m", "saetrain", tiny_bert, topics_jsonl, *BASE.split(), "--kernels", "native"]
    words += ["--save_dir", str(tmp_path)]
    for name, path, built in (("first", os.environ["PATH"], 1), ("second", str(tmp_path / "empty"), 0)):
        env = {**os.environ, **cache, "PATH": path}
        env.pop("CXX", None)
        done = subprocess.run([*words, "--run_name", name], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("building the C++ kernels (only once); they are cached in") == built
    env = {**env, "XDG_CACHE_HOME": str(tmp_path / "other")}
    done = subprocess.run([*words, "--run_name", "third"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        "no C++ compiler was found: install g++, c++ or clang++, or name a compiler in the variable CXX" in done.stderr
    )


def test_a_damaged_library_in_the_cache_is_built_anew(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "saetrain", tiny_bert, topics_jsonl, *BASE.split(), "--save_dir"]
    subprocess.run([*command, str(tmp_path / "one")], env=env, check=True, capture_output=True)
    (library,) = (tmp_path / "cache").rglob("*.so")
    library.write_bytes(b"no library")
    done = subprocess.run([*command, str(tmp_path / "two")], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert about(tmp_path / "two")["kernels"] == "native"


def test_an_error_does_not_wait_for_what_is_read_ahead(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    """A spike at the second step ends the process although the next pools' text takes a minute each to be read."""
    code = """
import sys, time
import saetrain.data.sharded as loader
from saetrain.training.trainer import SaeState
read, count = loader.ShardedSequences.read, SaeState.forward_backward
def slow(self, shard, cursor, tokens):
    if cursor != self.start_cursor:
        time.sleep(3)
    return read(self, shard, cursor, tokens)
loader.ShardedSequences.read = slow
SaeState.forward_backward = lambda self, raw, progress: count(self, raw * float("nan"), progress)
from saetrain.cli import main
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, tiny_bert, topics_jsonl, *BASE.split(), "--save_dir", str(tmp_path)]
    started = time.monotonic()
    command += ["--data_shards", "64", "--max_tokens", "6400"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - started < 60, "64 shards of 3 s each were waited for"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kernels native --optimizer sgd --lr 1", "--kernels native: they support only --optimizer adam, not sgd"),
        ("--kernels reference --compute_dtype bfloat16", "--kernels reference supports only float32"),
    ],
)
def test_what_does_not_go_together_is_named(
    words: str, message: str, tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([tiny_bert, topics_jsonl, *BASE.split(), *words.split(), "--save_dir", str(tmp_path)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_keeps_the_kernels_that_it_began_with(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [tiny_bert, topics_jsonl, *BASE.split(), "--save_dir", str(tmp_path), "--run_name", "run"]
    main([*words, "--kernels", "torch", "--compute_dtype", "float32"])
    capsys.readouterr()
    main([*words, "--resume"])
    assert "kernels: torch, products in float32" in capsys.readouterr().err
    main([*words, "--resume", "--kernels", "reference", "--compute_dtype", "float32"])
    said = capsys.readouterr().err
    assert "--kernels reference instead of torch: sums are rounded differently, so the bits will differ" in said
    assert "kernels: reference, products in float32" in said


def test_a_run_of_native_kernels_goes_on_without_a_compiler(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    words = [tiny_bert, topics_jsonl, "--run_name", "run"]
    main([*words, *BASE.split(), "--save_dir", str(tmp_path / "out"), "--kernels", "native"])
    done = without_compiler(tmp_path, *words, "--resume")
    assert done.returncode == 2
    assert "to resume a run that was started with native, pass --kernels torch" in done.stderr
    done = without_compiler(tmp_path, *words, "--resume", "--kernels", "torch")
    assert done.returncode == 0, done.stderr

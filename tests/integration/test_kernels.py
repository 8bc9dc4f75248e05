"""Which kernels a run takes, what it says of them, and what happens without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from saetrain.cli import main
from saetrain.data import sharded
from saetrain.ops.cpu_features import has_fast_bf16
from saetrain.ops.native import compile
from saetrain.training.sae_state import SaeState
from saetrain.training.steps.base import MicroBatch
from tests.processes import ForkedCommand, finish
from tests.unit.runs.test_checkpoint_state import remake_manifest

BASE = "--k 4 --num_latents 64 --batch_size 2 --ctx_len 32 --eval_tokens 500 --max_tokens 640 --buffer_tokens 256"
BASE += " --assess false"


def about(out: Path) -> dict[str, Any]:
    (path,) = out.glob("*/sae/*/cfg.json")
    return dict(json.loads(path.read_text())["saetrain"])


def run_without_compiler(tmp_path: Path, *words: str, code: int = 0) -> str:
    """Run the command line where no compiler works and no library is cached; return the output."""
    environment = {"CXX": "false", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return finish(ForkedCommand([*words, *BASE.split(), "--save_dir", str(tmp_path / "out")], environment), code)


def test_auto_takes_the_fastest_and_says_so(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([tiny_bert, topics_jsonl, *BASE.split(), "--save_dir", str(tmp_path)])
    dtype = "bfloat16" if has_fast_bf16(torch.device("cpu")) else "float32"
    assert f"kernels: native, products in {dtype}" in capsys.readouterr().err
    assert (about(tmp_path)["kernels"], about(tmp_path)["compute_dtype"]) == ("native", dtype)


def test_without_a_compiler_pytorch_s_kernels_are_used_and_logged(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    output = run_without_compiler(tmp_path, tiny_bert, topics_jsonl)
    message = "--kernels auto: the native kernels are not used: they can't be built: "
    message += "the compiler false (named by CXX) can't be run"
    assert output.count(message) == 1
    assert about(tmp_path / "out")["kernels"] == "torch"
    words = [tiny_bert, topics_jsonl, "--kernels", "native", "--run_name", "other"]
    output = run_without_compiler(tmp_path, *words, code=2)
    assert "saetrain: error: --kernels native: they can't be built" in output
    assert "Traceback" not in output


def test_a_compiler_that_is_no_command_is_named(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    output = run_native(tmp_path / "out", tmp_path / "cache", tiny_bert, topics_jsonl, 2, CXX="'g++")
    assert "the variable CXX is no command: No closing quotation" in output
    assert "Traceback" not in output


def run_native(out: Path, cache: Path, model: str, text: str, code: int = 0, **environment: str) -> str:
    """Run the native kernels with libraries cached below ``cache``; return the output."""
    words = [model, text, *BASE.split(), "--kernels", "native", "--save_dir", str(out)]
    return finish(ForkedCommand(words, {"CXX": "", "XDG_CACHE_HOME": str(cache), **environment}), code)


NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
BUILDING = "building the C++ kernels (only once); they are cached in"


@pytest.fixture(scope="module")
def cached_library(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, topics_jsonl: str) -> Path:
    """Cache that contains the library after a first run."""
    folder = tmp_path_factory.mktemp("library")
    output = run_native(folder / "out", folder / "cache", tiny_bert, topics_jsonl)
    assert output.count(BUILDING) == 1
    return folder / "cache"


def test_a_cached_library_needs_no_compiler(
    cached_library: Path, tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    no_compiler = {"PATH": str(tmp_path / "empty")}
    output = run_native(tmp_path / "out", cached_library, tiny_bert, topics_jsonl, **no_compiler)
    assert BUILDING not in output
    output = run_native(tmp_path / "out2", tmp_path / "other", tiny_bert, topics_jsonl, code=2, **no_compiler)
    assert "no C++ compiler was found: install g++, c++ or clang++, or name a compiler in the variable CXX" in output


def copy_instead_of_compiling(library: Path) -> None:
    """Let the compiler's part be done by a copy, because it takes about 20 s."""

    def run_command(command: list[str]) -> None:
        shutil.copy(library, command[command.index("-o") + 1])

    compile._run_command = run_command


def cut_file(library: Path) -> None:
    library.write_bytes(library.read_bytes()[: library.stat().st_size * 3 // 5])


def zero_middle(library: Path) -> None:
    content = library.read_bytes()
    quarter = len(content) // 4
    library.write_bytes(content[:quarter] + bytes(2 * quarter) + content[3 * quarter :])


def give_away(library: Path) -> None:
    os.chown(library, 65534, -1)


def empty_library(library: Path) -> None:
    """Put a library without functions in its place, with its hash."""
    source = library.parent.parent / "empty.c"
    source.write_text("")
    library.unlink()
    subprocess.run(["cc", "-shared", str(source), "-o", str(library.with_name("native-empty.so"))], check=True)
    library.with_name("native-empty.so").chmod(0o600)
    remake_manifest(library.parent)


def delete_library(library: Path) -> None:
    library.unlink()
    remake_manifest(library.parent)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut_file, "is built again, because native-"),
        (zero_middle, "is built again, because native-"),
        (lambda library: library.write_bytes(b"no library"), "is built again, because native-"),
        (
            lambda library: (library.parent / "manifest.json").unlink(),
            "is built again, because manifest.json is missing",
        ),
        (lambda library: library.chmod(0o620), "is built again, because others may write to"),
        (lambda library: library.parent.chmod(0o777), "is built again, because others may write to"),
        pytest.param(give_away, "is built again, because", marks=NEEDS_ROOT),
        (empty_library, "is built again, because its library could not be loaded"),
        (delete_library, "is built again, because it contains no library"),
    ],
)
def test_a_library_that_cannot_be_trusted_is_rebuilt_with_one_line(
    harm: Callable[[Path], object], said: str, cached_library: Path, tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    (original,) = cached_library.rglob("*.so")
    cache = shutil.copytree(cached_library, tmp_path / "cache")
    (library,) = cache.rglob("*.so")
    harm(library)
    words = [tiny_bert, topics_jsonl, *BASE.split(), "--kernels", "native", "--save_dir", str(tmp_path / "out")]
    environment, prepare = {"XDG_CACHE_HOME": str(cache)}, partial(copy_instead_of_compiling, original)
    output = finish(ForkedCommand(words, environment, prepare=prepare))
    assert output.count(said) == 1
    assert output.count(BUILDING) == 1
    assert about(tmp_path / "out")["kernels"] == "native"
    assert [path.read_bytes() for path in cache.rglob("*.so")] == [original.read_bytes()]
    assert BUILDING not in run_native(tmp_path / "again", cache, tiny_bert, topics_jsonl)


def delay_reads_and_spoil_activations() -> None:
    """Let every read after the first take 3 s, and make the activations of each step NaN."""
    read, forward_backward = sharded.ShardedSequences.read, SaeState.forward_backward

    def read_slowly(self: Any, shard: int, cursor: Any, tokens: int) -> Any:
        if cursor != self.start_cursor:
            time.sleep(3)
        return read(self, shard, cursor, tokens)

    sharded.ShardedSequences.read = read_slowly  # type: ignore[method-assign]
    SaeState.forward_backward = lambda self, batch, ctx: forward_backward(  # type: ignore[method-assign]
        self, MicroBatch.of_sae(batch.x_ND * float("nan")), ctx
    )


def test_an_error_does_not_wait_for_the_prefetch(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    """A loss spike in the first step ends the process, although the text of the next pools takes minutes to read."""
    words = [tiny_bert, topics_jsonl, *BASE.split(), "--save_dir", str(tmp_path)]
    words += ["--data_shards", "64", "--max_tokens", "6400"]
    process = ForkedCommand(words, prepare=delay_reads_and_spoil_activations)
    assert "the loss of step 1 is nan" in finish(process, 2, timeout_s=60), "waited for 64 shards of 3 s each"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kernels native --multi_topk true", "--kernels native: they do not support --multi_topk"),
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


def test_a_run_of_native_kernels_resumes_without_a_compiler(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    words = [tiny_bert, topics_jsonl, "--run_name", "run"]
    main([*words, *BASE.split(), "--save_dir", str(tmp_path / "out"), "--kernels", "native"])
    output = run_without_compiler(tmp_path, *words, "--resume", code=2)
    assert "to resume a run that was started with native, pass --kernels torch" in output
    run_without_compiler(tmp_path, *words, "--resume", "--kernels", "torch")

"""A run that reads activations from the cache ends with the same bits as one that computes them."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from saetrain.activations.capture import ActivationCapture
from saetrain.activations.store import list_shards
from saetrain.cli import main
from tests.integration.conftest import limit_file_size
from tests.integration.test_resume import fingerprint, records, start, wait_for_step
from tests.processes import finish

BASE = (
    "--k 4 --num_latents 64 --batch_size 4 --ctx_len 32 --eval_tokens 500 --assess false --max_tokens 2560 "
    "--buffer_tokens 1024 --log_every 1 --model_batch_tokens 256"
)


class Runs:
    """Runs of one model and text in this process, with a cache."""

    def __init__(self, folder: Path, model: str, text: str) -> None:
        self.folder, self.cache, self.words = folder, folder / "cache", [model, text, *BASE.split()]
        self.n_forward = 0

    def run(self, name: str, *flags: str, cached: bool = True) -> dict[str, str]:
        """Train; return hashes of the SAEs, and set ``n_forward`` to the number of the model's forward passes."""
        self.n_forward = 0
        cache = ["--cache_activations", "--cache_dir", str(self.cache)] if cached else []
        main([*self.words, "--layers", "1", *cache, *flags, "--save_dir", str(self.folder), "--run_name", name])
        return fingerprint(self.folder / name)

    def shards(self) -> list[Path]:
        return [path for folder in sorted(self.cache.iterdir()) if folder.is_dir() for path in list_shards(folder)]


@pytest.fixture
def runs(tmp_path: Path, tiny_bert: str, topics_jsonl: str, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Runs whose forward passes after the probe of the hookpoints are counted."""
    found = Runs(tmp_path, tiny_bert, topics_jsonl)
    capture = ActivationCapture.__call__

    def count_passes(self: ActivationCapture, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        found.n_forward += self._last_hookpoint is not None
        return capture(self, ids, mask)

    monkeypatch.setattr(ActivationCapture, "__call__", count_passes)
    return found


@pytest.mark.parametrize("flags", [[], ["--layers", "0", "3"], ["--streaming", "--data_shards", "4"]])
def test_bits_are_those_of_an_uncached_run(runs: Runs, flags: list[str]) -> None:
    expected = runs.run("uncached", *flags, cached=False)
    computed = runs.n_forward
    assert runs.run("first", *flags) == expected
    # The first batches are measured, trained on and scored, but computed once.
    assert 0 < runs.n_forward < computed
    assert runs.run("second", *flags) == expected
    assert runs.n_forward == 0
    assert records(runs.folder / "first") == records(runs.folder / "uncached") == records(runs.folder / "second")


@pytest.mark.parametrize(
    "flags",
    [
        ["--shuffle_seed", "7"],
        ["--buffer_tokens", "512", "--data_shards", "4", "--exclude_sinks", "false"],
        ["--init_seeds", "1", "2", "--lr", "0.01", "--exclude_special_tokens", "false"],
    ],
)
def test_a_run_with_other_settings_reads_the_same_cache(runs: Runs, flags: list[str]) -> None:
    runs.run("first", "--max_tokens", "200000")
    n_shards = len(runs.shards())
    expected = runs.run("uncached", *flags, cached=False)
    assert runs.run("cached", *flags) == expected
    # The seed chooses the held-out batches; their 500 tokens are at most three batches.
    assert runs.n_forward <= 3 * ("--shuffle_seed" in flags)
    assert len(runs.shards()) == n_shards + bool(runs.n_forward)


def test_a_longer_run_extends_the_cache(runs: Runs) -> None:
    runs.run("short")
    n_forward, long = runs.n_forward, ("--max_tokens", "10240")
    expected = runs.run("uncached", *long, cached=False)
    n_uncached = runs.n_forward
    assert runs.run("long", *long) == expected
    assert 0 < runs.n_forward <= n_uncached - n_forward
    assert runs.run("again", *long) == expected
    assert runs.n_forward == 0


def test_another_model_dtype_or_hookpoint_has_activations_of_its_own(runs: Runs) -> None:
    runs.run("first")
    for number, flags in enumerate((["--dtype", "bfloat16"], ["--layers", "2"]), 2):
        runs.run(f"run{number}", *flags)
        assert runs.n_forward > 0
        assert len([path for path in runs.cache.iterdir() if path.is_dir()]) == number
    expected = runs.run("uncached", "--dtype", "bfloat16", cached=False)
    assert runs.run("cached", "--dtype", "bfloat16") == expected
    assert runs.n_forward == 0


def test_damage_is_found_and_repaired(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    expected = runs.run("first")
    (shard,) = runs.shards()
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert runs.run("damaged") == expected
    assert runs.n_forward > 0
    assert capsys.readouterr().err.count("is damaged") == 1
    # What was read from the file before the damage was found is stored by the next run.
    for name in ("repaired", "complete"):
        assert runs.run(name) == expected
    assert runs.n_forward == 0


@pytest.mark.parametrize("content", [b"", b"not a shard", b"\xff" * 100, b'\x10\0\0\0\0\0\0\0{"a":{"dtype":1}}'])
def test_a_file_that_is_no_shard_is_replaced(runs: Runs, content: bytes) -> None:
    expected = runs.run("first")
    (shard,) = runs.shards()
    shard.write_bytes(content)
    assert runs.run("second") == expected
    assert runs.n_forward > 0
    assert runs.run("third") == expected
    assert runs.n_forward == 0


def test_a_full_cache_stops_storing_with_one_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    expected = runs.run("uncached", cached=False)
    capsys.readouterr()
    assert runs.run("first", "--cache_size", "300kB") == expected
    assert capsys.readouterr().err.count("new activations are not stored") == 1
    n_bytes = sum(shard.stat().st_size for shard in runs.shards())
    assert 150_000 < n_bytes < 300_000
    assert runs.run("second", "--cache_size", "300kB") == expected
    assert runs.n_forward > 0
    assert sum(shard.stat().st_size for shard in runs.shards()) == n_bytes


def test_activations_of_earlier_runs_make_room(runs: Runs) -> None:
    runs.run("first", "--layers", "2")
    old = runs.shards()
    expected = runs.run("second", "--cache_size", "4MB")
    assert not set(old) & set(runs.shards())
    assert runs.run("third", "--cache_size", "4MB") == expected
    assert runs.n_forward == 0


def test_a_resumed_run_reads_the_cache(runs: Runs) -> None:
    flags = ["--save_every", "10"]
    expected = runs.run("whole", *flags)
    runs.run("resumed", *flags)
    shutil.rmtree(runs.folder / "resumed" / "sae")
    shutil.rmtree(runs.folder / "resumed" / "checkpoints" / f"step_{20:09d}")
    assert runs.run("resumed", *flags, "--resume") == expected
    assert runs.n_forward == 0
    shutil.rmtree(runs.folder / "resumed" / "sae")
    shutil.rmtree(runs.folder / "resumed" / "checkpoints" / f"step_{20:09d}")
    assert runs.run("resumed", *flags, "--resume", cached=False) == expected


def test_two_processes_share_a_cache_and_one_is_killed(runs: Runs) -> None:
    expected = runs.run("uncached", "--max_tokens", "25600", cached=False)
    words = [*runs.words, "--layers", "1", "--max_tokens", "25600", "--cache_activations", "--cache_dir"]
    words += [str(runs.cache), "--cache_size", "4MB"]
    processes = [start(runs.folder, f"run{number}", words) for number in range(3)]
    wait_for_step(processes[2], runs.folder / "run2", 20)
    processes[2].kill()
    for process in processes[:2]:
        finish(process)
    for number in range(2):
        assert fingerprint(runs.folder / f"run{number}") == expected
    assert runs.run("last", "--max_tokens", "25600") == expected


def test_a_full_disk_stops_storing_and_not_the_run(
    runs: Runs, tiny_bert: str, topics_jsonl: str, tmp_path: Path
) -> None:
    expected = runs.run("uncached", cached=False)
    words = [*runs.words, "--layers", "1", "--cache_activations", "--cache_dir", str(runs.cache)]
    process = start(tmp_path, "full", words, partial(limit_file_size, 200_000))
    assert "can't be written" in finish(process)
    assert fingerprint(tmp_path / "full") == expected


def test_mistakes_are_named(runs: Runs, tmp_path: Path, tiny_gpt2: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for flags, message in {
        ("--cache_dir", str(tmp_path / "file")): "--cache_dir .*file: can't be written: File exists",
        ("--cache_size", "many"): "--cache_size 'many': must be a number of bytes, or .* 500MB",
        ("--loss_fn", "ce"): "--cache_activations: --loss_fn ce runs the model in each step",
    }.items():
        with pytest.raises(SystemExit) as caught:
            runs.run("run", *flags)
        assert caught.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_commands_list_verify_and_prune(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    runs.run("first")
    runs.run("second", "--layers", "0", "2")
    out, shards = ["--cache_dir", str(runs.cache)], runs.shards()
    capsys.readouterr()
    main(["cache", "list", *out])
    printed = capsys.readouterr().out
    for text in ("tiny-bert", "encoder.layer.1", "encoder.layer.0, encoder.layer.2", "float32", "MiB"):
        assert text in " ".join(printed.split()), printed
    main(["cache", "verify", *out])
    assert f"{len(shards)} files are intact" in capsys.readouterr().out
    main(["cache", "prune", *out, "--cache_size", "1GB"])
    assert runs.shards() == shards
    oldest, newest = sorted(shards, key=lambda path: path.stat().st_mtime)
    main(["cache", "prune", *out, "--cache_size", str(newest.stat().st_size)])
    assert runs.shards() == [newest]
    assert not oldest.parent.exists()
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["cache", "verify", *out])
    assert caught.value.code == 2
    assert "1 of 1 files are damaged" in capsys.readouterr().err
    main(["cache", "prune", *out, "--cache_size", "0"])
    assert runs.shards() == []
    capsys.readouterr()
    main(["cache", "list", *out])
    assert capsys.readouterr().out.endswith("0.0 KiB\n")


def test_dry_run_shows_the_size_and_stores_nothing(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    main([*runs.words, "--cache_activations", "--cache_dir", str(runs.cache), "--cache_size", "1GB", "--dry_run"])
    assert re.search(
        r"cache       360.0 KiB for the activations of 2,560 tokens, at most 953.7 MiB \(--cache_size\), in .*cache",
        capsys.readouterr().out,
    )
    assert not runs.cache.exists()


def test_commands_name_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "saetrain_activations.json").write_text('{"format": 7}')
    for words, message in {
        ("list", "--cache_dir", str(tmp_path / "none")): "--cache_dir .*none: there is no such folder",
        ("list", "--cache_dir", str(tmp_path)): "has format 7, and this version reads format 1",
        ("prune", "--cache_size", "1 gigabyte"): "--cache_size '1 gigabyte': must be",
        ("drop",): "drop",
        (): "list,verify,prune. is missing",
    }.items():
        with pytest.raises(SystemExit) as caught:
            main(["cache", *words])
        assert caught.value.code == 2
        assert re.search(message, capsys.readouterr().err)

"""A folder with a manifest is trusted only as a whole, and a cached one is built again by one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from saetrain.atomic_io import hash_file
from saetrain.manifest import MANIFEST_FILE, ensure_cached, find_damage, replace_folder, temporary_folder


def build_entry(folder: Path) -> None:
    (folder / "a.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "inner").mkdir()
    (folder / "inner" / "b.bin").write_bytes(b"b")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with replace_folder(tmp_path / "entry") as temporary:
        build_entry(temporary)
    assert find_damage(tmp_path / "entry") is None
    return tmp_path / "entry"


def flip_bit(folder: Path) -> None:
    content = bytearray((folder / "a.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "a.bin").write_bytes(content)


def zero_middle(folder: Path) -> None:
    content = (folder / "a.bin").read_bytes()
    (folder / "a.bin").write_bytes(content[:1000] + bytes(2000) + content[3000:])


def replace_by_link(folder: Path) -> None:
    (folder / "a.bin").rename(folder.parent / "elsewhere")
    (folder / "a.bin").symlink_to(folder.parent / "elsewhere")


def replace_by_fifo(folder: Path) -> None:
    (folder / "a.bin").unlink()
    os.mkfifo(folder / "a.bin")


def manifest_with(content: object) -> Callable[[Path], object]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / MANIFEST_FILE).write_text(text)


def list_outside(folder: Path) -> None:
    """Move a file out of the folder, and let the manifest name it there."""
    (folder / "a.bin").rename(folder.parent / "a.bin")
    hashes = {"../a.bin": hash_file(folder.parent / "a.bin"), "inner/b.bin": hash_file(folder / "inner" / "b.bin")}
    (folder / MANIFEST_FILE).write_text(json.dumps({"sha256": hashes}))


DAMAGES = pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip_bit, "a.bin does not match its hash"),
        (zero_middle, "a.bin does not match its hash"),
        (lambda folder: (folder / "a.bin").write_bytes(b""), "a.bin does not match its hash"),
        (lambda folder: (folder / "a.bin").unlink(), "'a.bin' is missing"),
        (lambda folder: (folder / "c.bin").write_bytes(b""), "'c.bin' is not listed in manifest.json"),
        (replace_by_link, "a.bin is not a regular file"),
        (replace_by_fifo, "a.bin is not a regular file"),
        (lambda folder: (folder / MANIFEST_FILE).unlink(), "manifest.json is missing"),
        (manifest_with(""), "can't be read"),
        (manifest_with("[" * 100_000), "can't be read"),
        (manifest_with([]), "can't be read"),
        (manifest_with({}), "can't be read"),
        (manifest_with({"sha256": None}), "can't be read"),
        (manifest_with({"sha256": {}}), "'a.bin' is not listed in manifest.json"),
        (manifest_with({"sha256": {"a.bin": 1, "inner/b.bin": 2}}), "a.bin does not match its hash"),
        (list_outside, "'../a.bin' is missing"),
    ],
)


@DAMAGES
def test_damage_is_found_and_named(harm: Callable[[Path], object], said: str, folder: Path) -> None:
    harm(folder)
    assert said in str(find_damage(folder))


@DAMAGES
def test_a_damaged_cache_is_built_again_with_one_line(harm: Callable[[Path], object], said: str, folder: Path) -> None:
    harm(folder)
    lines: list[str] = []
    ensure_cached(folder, build_entry, lines.append)
    assert len(lines) == 1
    assert f"{folder} is built again, because" in lines[0]
    assert said in lines[0]
    assert find_damage(folder) is None
    ensure_cached(folder, pytest.fail, lines.append)
    assert len(lines) == 1


def test_what_is_no_folder_or_unfinished_is_replaced(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    temporary_folder(entry).mkdir()
    (temporary_folder(entry) / "left").write_text("by a killed process")
    entry.write_text("a file")
    ensure_cached(entry, build_entry, lambda line: None)
    assert find_damage(entry) is None
    assert not temporary_folder(entry).exists()


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build_entry(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ensure_cached(tmp_path / "entry", fail, pytest.fail)
    assert [path.name for path in tmp_path.iterdir()] == [".entry.lock"]


def test_private_folders_ignore_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        ensure_cached(tmp_path / "entry", build_entry, pytest.fail, is_private=True)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "entry", *tmp_path.rglob("*")]}
    assert modes == {
        "entry": 0o700,
        "inner": 0o700,
        "a.bin": 0o600,
        "b.bin": 0o600,
        MANIFEST_FILE: 0o600,
        ".entry.lock": 0o600,
    }


def build_slowly(entry: Path, builds: Path) -> None:
    def build(folder: Path) -> None:
        (builds / str(os.getpid())).touch()
        time.sleep(0.5)
        build_entry(folder)

    ensure_cached(entry, build, lambda line: None)
    assert find_damage(entry) is None


def test_processes_that_need_the_same_folder_build_it_once(tmp_path: Path) -> None:
    builds = tmp_path / "builds"
    builds.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build_slowly, args=(tmp_path / "entry", builds)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(builds.iterdir())) == 1


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        os.kill(os.getpid(), 9)

    process = multiprocessing.get_context("fork").Process(
        target=ensure_cached, args=(tmp_path / "entry", build, lambda line: None)
    )
    process.start()
    process.join()
    assert process.exitcode == -9
    ensure_cached(tmp_path / "entry", build_entry, pytest.fail)

"""The library of the C++ kernels is loaded only from where no other user can replace it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from saetrain.ops.native import compile
from saetrain.ops.native.compile import build_library

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the kernels; what the compiler writes is replaced by a few bytes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(compile, "_find_compiler", lambda: ["c++"])
    monkeypatch.setattr(compile, "_get_compiler_version", lambda compiler: "1")
    monkeypatch.setattr(
        compile, "_run_command", lambda command: Path(command[command.index("-o") + 1]).write_bytes(b"library")
    )
    return tmp_path / "home" / "saetrain" / "kernels"


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o077])
def test_the_cache_is_private_whatever_the_umask(umask: int, cache: Path) -> None:
    before = os.umask(umask)
    try:
        library = build_library()
    finally:
        os.umask(before)
    assert library.is_relative_to(cache)
    places = [library, library.with_name("manifest.json"), library.parent, cache, *list(cache.parents)[:2]]
    assert [place.stat().st_mode & 0o777 for place in places] == [0o600, 0o600, 0o700, 0o700, 0o700, 0o700]
    assert build_library() == library


def give_away(place: Path) -> None:
    os.chown(place, 65534, -1)


@pytest.mark.parametrize("place", [".", "..", "../.."])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda place: place.chmod(0o770), "others may write to"),
        (lambda place: place.chmod(0o702), "others may write to"),
        pytest.param(give_away, "belongs to user 65534", marks=NEEDS_ROOT),
    ],
)
def test_a_cache_that_others_can_change_is_not_used(
    harm: Callable[[Path], object], said: str, place: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = build_library()
    changed = (cache / place).resolve()
    harm(changed)
    capsys.readouterr()
    library = build_library()
    assert not library.is_relative_to(cache)
    assert library.read_bytes() == b"library"
    lines = [line for line in capsys.readouterr().err.splitlines() if "is not used, because" in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert str(changed) in lines[0]
    assert first.exists()
    shutil.rmtree(library.parents[1])


def test_a_sticky_folder_above_is_trusted_but_not_the_cache_itself(cache: Path) -> None:
    library = build_library()
    cache.parents[1].chmod(0o1777)
    assert build_library() == library
    cache.chmod(0o1777)
    assert not build_library().is_relative_to(cache)


@NEEDS_ROOT
def test_what_another_user_put_into_a_sticky_folder_is_not_loaded(cache: Path) -> None:
    library = build_library()
    cache.parents[1].chmod(0o1777)
    for path in [cache.parent, *cache.parent.rglob("*")]:
        os.chown(path, 65534, -1)
    assert not build_library().is_relative_to(cache)
    assert library.exists()


def test_without_a_safe_place_no_library_is_built(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_library()
    cache.chmod(0o777)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    with pytest.raises(OSError, match=r"others may write to .*shared .*name another folder in the variable TMPDIR"):
        build_library()


def test_a_library_is_used_without_a_compiler_only_if_it_is_intact(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build_library()
    monkeypatch.setattr(compile, "_find_compiler", lambda: None)
    assert build_library() == library
    library.write_bytes(b"other")
    with pytest.raises(OSError, match=r"no C\+\+ compiler was found"):
        build_library()

"""One run at a time writes to a run directory, and a killed run never blocks the next start."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import filelock
import pytest

from saetrain.errors import SaetrainError
from saetrain.runs.run_dir import LOCK_FILE, RUN_MARKER
from saetrain.runs.run_lock import lock_run_dir

context = multiprocessing.get_context("fork")


def hold_lock(directory: Path, ready: Path) -> None:
    """Hold the lock until a signal comes, with a forked process that lives longer, as a tokenizing pool may."""
    with lock_run_dir(directory):
        (directory / RUN_MARKER).touch()
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        ready.write_text(str(child))
        time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_second_start_is_refused_until_the_first_ends(number: signal.Signals, tmp_path: Path) -> None:
    directory, ready = tmp_path / "out" / "run", tmp_path / "ready"
    process = context.Process(target=hold_lock, args=(directory, ready))
    process.start()
    while not ready.exists() or not ready.read_text():
        time.sleep(0.01)
    with pytest.raises(SaetrainError) as caught, lock_run_dir(directory):
        pytest.fail("both have the lock")
    assert f"{directory} is in use by process {process.pid} on host {socket.gethostname()};" in str(caught.value)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    with lock_run_dir(directory):
        assert (directory / LOCK_FILE).read_text() == f"{os.getpid()} {socket.gethostname()}"
    os.kill(int(ready.read_text()), signal.SIGKILL)
    assert [path.name for path in directory.iterdir()] == [RUN_MARKER]


@pytest.mark.parametrize("left", ["", "not a process", "12 \x1b[31mhost", "\udcff"])
def test_a_lock_file_of_any_content_is_read(left: str, tmp_path: Path) -> None:
    lock = filelock.FileLock(tmp_path / LOCK_FILE)
    with lock:
        (tmp_path / LOCK_FILE).write_bytes(left.encode(errors="surrogateescape"))
        with pytest.raises(SaetrainError, match="is in use by another process;"), lock_run_dir(tmp_path):
            pytest.fail("both have the lock")
    with lock_run_dir(tmp_path):
        pass


def test_a_block_that_writes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SaetrainError, match="no such model"), lock_run_dir(tmp_path / "a" / "b"):
        raise SaetrainError("no such model")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with lock_run_dir(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_other_ranks_take_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lock_run_dir(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with lock_run_dir(tmp_path), lock_run_dir(tmp_path / "absent"):
            assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOLCK, None), (errno.EOPNOTSUPP, None), (errno.ENOSPC, "can't write to"), (errno.EACCES, "can't write")],
)
def test_a_file_system_without_locks_is_logged(
    number: int, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    if said is None:
        with lock_run_dir(tmp_path / "run"):
            (tmp_path / "run" / "file").touch()
        assert capsys.readouterr().err.count("can't be locked") == 1
    else:
        with pytest.raises(SaetrainError, match=said), lock_run_dir(tmp_path / "run"):
            pytest.fail("not writable")
        assert not list(tmp_path.iterdir())

"""The lock of a run directory: one run at a time writes to it. A lock of a killed process is free again."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.logs.console import log_rank0
from saetrain.runs.run_dir import LOCK_FILE, is_run_dir, is_unused

UNSUPPORTED_ERRORS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def lock_run_dir(directory: Path) -> Iterator[None]:
    """Create ``directory`` and hold its lock within the block, on rank 0; if the block leaves it empty, it is deleted.

    A folder of other files is left to the caller, who refuses it. Raises SaetrainError if another run holds the lock,
    or if the directory is not writable.
    """
    if env.rank() != 0:
        yield
        return
    # Unlike Path.exists, os.path.exists is false for a name that is too long, which mkdir refuses below.
    created = [path for path in (directory, *directory.parents) if not os.path.exists(path)]
    try:
        with _hold_lock(directory):
            yield
    finally:
        for path in created:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


@contextlib.contextmanager
def _hold_lock(directory: Path) -> Iterator[None]:
    path = directory / LOCK_FILE
    lock = FileLock(path, fallback_to_soft=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if is_unused(directory) or is_run_dir(directory):
            lock.acquire(timeout=0)
            path.write_text(f"{os.getpid()} {socket.gethostname()}")
    except Timeout as error:
        raise SaetrainError(
            f"{directory} is in use by {_describe_holder(path)}; wait until that run ends, or pass another --run_name"
        ) from error
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRORS:
            raise SaetrainError(
                f"--save_dir {directory.parent}: can't write to {directory}: {error.strerror}"
            ) from error
        log_rank0(f"{directory} can't be locked ({error.strerror}); make sure that no other run writes to it")
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                path.unlink()
        lock.release()


def _describe_holder(path: Path) -> str:
    try:
        found = re.fullmatch(r"(\d+) ([\w.-]+)", path.read_text())
    except (OSError, ValueError):
        found = None
    return f"process {found[1]} on host {found[2]}" if found else "another process"

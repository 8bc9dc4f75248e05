"""Folders with a manifest: each file is listed with its hash, and a folder is complete or does not exist."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from saetrain.atomic_io import delete_path, fsync_dir, fsync_files, hash_file, write_json
from saetrain.distributed import record_progress
from saetrain.errors import SaetrainError
from saetrain.small_files import read_json

MANIFEST_FILE = "manifest.json"
LOCK_POLL_S = 10.0
"""Seconds between signs of progress while another process holds a lock."""


def temporary_folder(folder: Path) -> Path:
    """Return the path to which ``folder`` is written before the rename; a killed process may leave that folder."""
    return folder.with_name(f".writing_{folder.name}")


@contextlib.contextmanager
def replace_folder(folder: Path, *, is_private: bool = False) -> Iterator[Path]:
    """Yield a temporary folder, which gets a manifest and replaces ``folder`` when the block ends without an error.

    ``is_private``: only the user may read the folder and its files (modes 0700 and 0600, whatever the umask).
    Raises OSError (disk full, no permission), and then deletes the temporary folder.
    """
    temporary = temporary_folder(folder)
    try:
        delete_path(temporary)
        temporary.mkdir(0o700 if is_private else 0o777)
        yield temporary
        hashes = {name: hash_file(temporary / name) for name in _list_files(temporary)}
        write_json(temporary / MANIFEST_FILE, {"sha256": hashes})
        if is_private:
            for path in temporary.rglob("*"):
                path.chmod(0o700 if path.is_dir() else 0o600)
        fsync_files(temporary)
        delete_path(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(folder.parent)


def find_damage(folder: Path) -> str | None:
    """Return how the files of ``folder`` differ from its manifest, or None if they are intact."""
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        return f"{MANIFEST_FILE} is missing"
    try:
        listed = read_json(manifest, dict[str, dict[str, Any]])["sha256"]
        # The names come from the folder, so a name in the manifest never leads to another place.
        found = _list_files(folder)
        for name in sorted({*listed} ^ {*found}):
            return f"{name!r} is {'missing' if name in listed else f'not listed in {MANIFEST_FILE}'}"
        for name in found:
            path = folder / name
            if path.is_symlink() or not path.is_file():
                return f"{name} is not a regular file"
            if hash_file(path) != listed[name]:
                return f"{name} does not match its hash"
    except (OSError, KeyError, SaetrainError):
        return f"{MANIFEST_FILE} or a file that it lists can't be read"
    return None


def _list_files(folder: Path) -> list[str]:
    """Return the paths of everything below ``folder`` but folders and the manifest, relative to it."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST_FILE)


def ensure_cached(
    folder: Path,
    build: Callable[[Path], None],
    log: Callable[[str], None],
    *,
    is_private: bool = False,
    find_problem: Callable[[Path], str | None] = find_damage,
) -> None:
    """Make sure that ``folder`` is intact: if it is missing or damaged, ``build`` writes its files to a given folder.

    ``find_problem`` returns what is wrong with an existing folder, or None. Another process that writes the same folder
    is waited for. ``log`` is called with one line if there is one, or if the folder has a problem. Raises
    OSError if the folder can't be written, and what ``build`` raises.
    """
    with _hold_lock(folder.with_name(f".{folder.name}.lock"), log, 0o600 if is_private else -1):
        is_missing = not os.path.lexists(folder)
        problem = None if is_missing else find_problem(folder)
        if problem:
            log(f"{folder} is built again, because {problem}")
        if is_missing or problem:
            with replace_folder(folder, is_private=is_private) as temporary:
                build(temporary)


@contextlib.contextmanager
def _hold_lock(path: Path, log: Callable[[str], None], mode: int) -> Iterator[None]:
    lock, is_waiting = FileLock(path, mode=mode), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=LOCK_POLL_S if is_waiting else 0)
        except Timeout:
            record_progress()
            if not is_waiting:
                log(f"waiting for another process, which holds {path}")
            is_waiting = True
    try:
        yield
    finally:
        lock.release()

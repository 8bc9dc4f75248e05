"""Writing so that a crash leaves the old file or the new one, and hashing what was written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def fsync_dir(path: Path) -> None:
    """Make renames and new names inside ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(path: Path) -> Path:
    """Where ``path`` is written before it takes its place; a process that is killed may leave it behind."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """A temporary neighbour to write to, which takes ``path``'s place when the block ends without an error.

    Raises OSError (disk full, no permission); ``path`` then holds what it held before.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_atomic(path: Path, content: str) -> None:
    """Write ``content`` to ``path`` whole or not at all."""
    with atomic_replace(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

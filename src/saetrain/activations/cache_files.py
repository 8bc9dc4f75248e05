"""The folder of the activation cache: its settings, and its shards by last use, of which the oldest are deleted."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from filelock import FileLock

from saetrain.activations.store import METADATA_FILE, list_shards
from saetrain.errors import SaetrainError
from saetrain.settings import MAX_TOTAL, Settings
from saetrain.types import shown_default
from saetrain.untrusted import show_value

LOCK_FILE = ".lock"
LOCK_TIMEOUT_S = 60.0
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", re.IGNORECASE)
DEFAULT_CACHE_SIZE = "50GB"


def parse_size(text: str) -> int:
    """Return the number of bytes that the value of --cache_size stands for; SaetrainError if it is not a size."""
    match = SIZE.fullmatch(text.strip())
    size = float(match[1]) * 1000 ** " kmgt".index(match[2].lower() or " ") if match else math.inf
    if size > MAX_TOTAL:
        raise SaetrainError(
            f"--cache_size {show_value(text)}: must be a number of bytes, or one with a unit such as 500MB or 1.5TB"
        )
    return int(size)


@dataclass(frozen=True, kw_only=True)
class CacheSettings(Settings):
    """Cache of the model's activations on disk."""

    cache_activations: bool = False
    """Store the model's activations on disk, and read those that an earlier run with the same model has stored."""
    cache_dir: Annotated[str | None, shown_default("~/.cache/saetrain/activations", "DIR")] = None
    """Folder of the cache; runs may share it."""
    cache_size: str = DEFAULT_CACHE_SIZE
    """Largest size of the cache, such as 500MB or 50GB. Activations that were not used for longest are deleted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.cache_size)


def resolve_cache_dir(given: str | None) -> Path:
    """Return the folder of the cache: ``given``, or the user's default."""
    if given is not None:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saetrain" / "activations"


@contextlib.contextmanager
def lock_cache(cache_dir: Path) -> Iterator[None]:
    """Hold the lock of writers within the block; OSError if another process holds it for LOCK_TIMEOUT_S."""
    with FileLock(cache_dir / LOCK_FILE, timeout=LOCK_TIMEOUT_S):
        yield


@dataclass(frozen=True)
class StoredFile:
    """A shard of the cache with its size and the time of its last use, in seconds since the epoch."""

    path: Path
    n_bytes: int
    used_at: float


def list_folders(cache_dir: Path) -> list[Path]:
    """Return the folders below ``cache_dir`` that contain activations, one per model and set of hookpoints."""
    return sorted(path.parent for path in cache_dir.glob(f"*/{METADATA_FILE}"))


def list_files(folder: Path) -> list[StoredFile]:
    """Return the shards of a folder, without those that another process deletes at the same time."""
    found = []
    for path in list_shards(folder):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append(StoredFile(path, status.st_size, status.st_mtime))
    return found


def mark_used(path: Path) -> None:
    """Record that a shard is used now."""
    # Another process may have deleted it, or the cache may belong to another user.
    with contextlib.suppress(OSError):
        os.utime(path)


def make_room(cache_dir: Path, n_bytes: int, max_bytes: int, used_before: float = math.inf) -> bool:
    """Delete shards, least recently used first, until ``n_bytes`` more fit into ``max_bytes``; return whether they do.

    ``used_before``: seconds since the epoch; shards that were used later are kept. Nothing is deleted in vain.
    """
    files = sorted((file for folder in list_folders(cache_dir) for file in list_files(folder)), key=lambda f: f.used_at)
    excess = sum(file.n_bytes for file in files) + n_bytes - max_bytes
    deletable = [file for file in files if file.used_at < used_before]
    if excess > sum(file.n_bytes for file in deletable):
        return False
    for file in deletable:
        if excess <= 0:
            break
        file.path.unlink(missing_ok=True)
        excess -= file.n_bytes
    return True


def delete_empty_folders(cache_dir: Path) -> None:
    """Delete the folders without shards, and the files that killed processes have left; the caller holds the lock."""
    for folder in list_folders(cache_dir):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        if not list_shards(folder):
            (folder / METADATA_FILE).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it contains other files
                folder.rmdir()

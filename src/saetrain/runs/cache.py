"""``saetrain cache list|verify|prune``: what the cache of activations contains, and whether it is intact."""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table
from rich.text import Text

from saetrain.activations.cache_files import (
    delete_empty_folders,
    list_files,
    list_folders,
    lock_cache,
    make_room,
    parse_size,
    resolve_cache_dir,
)
from saetrain.activations.store import Shard, read_metadata
from saetrain.errors import SaetrainError
from saetrain.logs.console import print_rank0
from saetrain.runs.cache_settings import CacheConfig
from saetrain.runs.sae_table import open_console
from saetrain.runs.train.memory import format_bytes

COLUMNS = ("folder", "model", "hookpoints", "dtype", "tokens", "size", "last used")
MAX_SHOWN_HOOKPOINTS = 3


def manage_cache(config: CacheConfig) -> None:
    """List, verify or prune the cache; SaetrainError if a file is damaged, or if there is no cache."""
    cache_dir = resolve_cache_dir(config.cache_dir)
    if not cache_dir.is_dir():
        raise SaetrainError(f"--cache_dir {cache_dir}: there is no such folder; --cache_activations creates it")
    if config.action == "list":
        _list_cache(cache_dir)
    elif config.action == "verify":
        _verify_cache(cache_dir)
    else:
        _prune_cache(cache_dir, parse_size(config.cache_size))


def _list_cache(cache_dir: Path) -> None:
    table, total = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False), 0
    for title in COLUMNS:
        is_number = title in ("tokens", "size")
        table.add_column(title, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for folder in list_folders(cache_dir):
        metadata, files = read_metadata(folder), list_files(folder)
        size, names = sum(file.n_bytes for file in files), list(metadata.hookpoints)
        more = f", … ({len(names)})" if len(names) > MAX_SHOWN_HOOKPOINTS else ""
        used_at = time.strftime("%Y-%m-%d %H:%M", time.localtime(max((file.used_at for file in files), default=0)))
        # The last folder identifies a local model well enough.
        model = Path(metadata.model).name if Path(metadata.model).is_absolute() else metadata.model
        cells = [folder.name, model, ", ".join(names[:MAX_SHOWN_HOOKPOINTS]) + more, metadata.dtype]
        # Each file also contains a few bytes per unit, which the division leaves out.
        cells += [f"{size // metadata.bytes_per_token:,}", format_bytes(size), used_at if files else "never"]
        table.add_row(*map(Text, cells))
        total += size
    if table.rows:
        open_console().print(table)
    print_rank0(f"{cache_dir}: {format_bytes(total)}")


def _verify_cache(cache_dir: Path) -> None:
    damaged, n_files = [], 0
    for folder in list_folders(cache_dir):
        metadata = read_metadata(folder)
        for file in list_files(folder):
            n_files += 1
            try:
                Shard(file.path, metadata).verify_units()
            except SaetrainError as error:
                damaged.append(file.path)
                print_rank0(str(error))
            except FileNotFoundError:
                # A run has deleted it to make room.
                n_files -= 1
    if damaged:
        raise SaetrainError(
            f"--cache_dir {cache_dir}: {len(damaged)} of {n_files} files are damaged; delete them, or let the next run "
            "compute their activations again"
        )
    print_rank0(f"{cache_dir}: {n_files} files are intact")


def _prune_cache(cache_dir: Path, max_bytes: int) -> None:
    with lock_cache(cache_dir):
        before = sum(file.n_bytes for folder in list_folders(cache_dir) for file in list_files(folder))
        make_room(cache_dir, 0, max_bytes)
        after = sum(file.n_bytes for folder in list_folders(cache_dir) for file in list_files(folder))
        delete_empty_folders(cache_dir)
    print_rank0(f"{cache_dir}: deleted {format_bytes(before - after)}, {format_bytes(after)} are left")

"""Hugging Face hub: local caches come first, and one check finds within seconds whether the hub can be reached."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlparse

from saetrain.errors import SaetrainError, did_you_mean

T = TypeVar("T")
FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".bin")


@functools.cache
def is_hub_reachable(timeout_s: float = 3.0) -> bool:
    """Return whether a connection to the hub (or to the proxy, if one is set) opens within ``timeout_s`` seconds."""
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    target = urlparse(urllib.request.getproxies().get("https") or constants.ENDPOINT)
    port = target.port or (443 if target.scheme == "https" else 80)
    opened = threading.Event()

    def try_connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection((target.hostname or "", port), timeout=timeout_s):
            opened.set()

    # The socket's own timeout applies to each address of a host name separately, and not to the DNS lookup.
    thread = threading.Thread(target=try_connect, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return opened.is_set()


@contextlib.contextmanager
def offline_mode() -> Iterator[None]:
    """Make the hub's libraries use only their caches within the block."""
    import datasets.config
    from huggingface_hub import constants

    previous = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    verbosity = datasets.logging.get_verbosity()
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    # The library would warn that it could not reach the hub, although it did not try to.
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = previous
        datasets.logging.set_verbosity(verbosity)


def load_cached_or_fetch(description: str, load: Callable[[], T]) -> T:
    """Return ``load()`` from the local caches if they are complete, else over the network.

    Raises SaetrainError that names ``description`` if the network is needed and the hub can't be reached.
    """
    try:
        with offline_mode():
            return load()
    except (OSError, ValueError):  # The libraries raise these for a file that is not in the cache.
        require_hub(description)
    return load()


def refuse_missing_path(description: str, name: str) -> None:
    """Raise SaetrainError if ``name``, which does not exist locally, looks like a path and not like a hub id."""
    suggestion = did_you_mean(
        Path(name).name, [p.name for p in Path(name).parent.iterdir()] if Path(name).parent.is_dir() else []
    )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in FILE_SUFFIXES:
        raise SaetrainError(f"{description} '{name}': no such file or folder.{suggestion}")


def require_hub(description: str) -> None:
    """Raise SaetrainError that ``description`` is not on this machine, unless the hub can be reached."""
    if not is_hub_reachable():
        raise SaetrainError(
            f"{description} is neither a local path nor (completely) in the local cache, and the hub can't be reached "
            "(no network?); pass a local path, or connect to the network and try again"
        )

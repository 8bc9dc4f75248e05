"""The hub: its local caches first, and whether it can be reached, asked once and answered within seconds."""

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
    """Whether a connection to the hub opens within ``timeout_s`` seconds (through a proxy where one is set)."""
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

    # The socket's own limit holds for each of a name's addresses, and not at all for finding them.
    thread = threading.Thread(target=try_connect, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return opened.is_set()


@contextlib.contextmanager
def offline_mode() -> Iterator[None]:
    """Within it, the hub's libraries look into their caches alone."""
    import datasets.config
    from huggingface_hub import constants

    previous = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    verbosity = datasets.logging.get_verbosity()
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    # It would warn that the hub could not be found, which was not asked.
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = previous
        datasets.logging.set_verbosity(verbosity)


def load_cached_or_fetch(description: str, load: Callable[[], T]) -> T:
    """``load()`` from the local caches where they hold all that it needs, else over the network."""
    try:
        with offline_mode():
            return load()
    except (OSError, ValueError):  # what the libraries raise for a file that is not in the cache
        require_hub(description)
    return load()


def refuse_missing_path(description: str, name: str) -> None:
    """SaetrainError when ``name`` is spelt like a path, which no hub id is; it is known not to be there."""
    suggestion = did_you_mean(
        Path(name).name, [p.name for p in Path(name).parent.iterdir()] if Path(name).parent.is_dir() else []
    )
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in FILE_SUFFIXES:
        raise SaetrainError(f"{description} '{name}': no such file or folder.{suggestion}")


def require_hub(description: str) -> None:
    """SaetrainError that ``what`` is not on this machine, unless the hub can be reached."""
    if not is_hub_reachable():
        raise SaetrainError(
            f"{description} is neither a local path nor (whole) in the local cache, and the hub can't be reached "
            "(no network?); give a local path, or connect and try again"
        )

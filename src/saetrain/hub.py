"""Whether the hub can be reached, asked once and answered within seconds."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Iterator
from urllib.parse import urlparse

from saetrain.errors import SaetrainError


@functools.cache
def reachable(timeout_s: float = 3.0) -> bool:
    """Whether a connection to the hub opens within ``timeout_s`` seconds (through a proxy where one is set)."""
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    target = urlparse(urllib.request.getproxies().get("https") or constants.ENDPOINT)
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        with socket.create_connection((target.hostname or "", port), timeout=timeout_s):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Within it, the hub's libraries look into their caches alone."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def require_hub(what: str) -> None:
    """SaetrainError that ``what`` is not on this machine, unless the hub can be reached."""
    if not reachable():
        raise SaetrainError(
            f"{what} is neither a local path nor in the local cache, and the hub can't be reached (no network?); "
            "give a local path, or connect and try again"
        )

"""Hugging Face hub: local caches come first, and one check finds within seconds whether the hub can be reached."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar
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


class RepoFiles(NamedTuple):
    """The paths of the files of a repository; without a network only of those in the cache (not ``is_complete``)."""

    files: list[str]
    is_complete: bool


def list_files(repo: str, revision: str | None) -> RepoFiles:
    """Return the files of model repository ``repo``; SaetrainError if it is neither on the hub nor in the cache."""
    from huggingface_hub import HfApi

    if is_hub_reachable():
        with explain_hub_errors(repo):
            return RepoFiles(HfApi().list_repo_files(repo, revision=revision), is_complete=True)
    root = download_files(repo, revision, [])
    files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return RepoFiles(files, is_complete=False)


def download_files(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """Download the files of model repository ``repo`` that match ``patterns``, and return the folder of its commit.

    Without a network the files come from the cache. Raises SaetrainError if they can't be had.
    """
    from huggingface_hub import snapshot_download

    with explain_hub_errors(repo), contextlib.nullcontext() if is_hub_reachable() else offline_mode():
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


@contextlib.contextmanager
def explain_hub_errors(repo: str) -> Iterator[None]:
    """Convert errors of a download from or an upload to ``repo`` to a SaetrainError, which never contains the token."""
    from huggingface_hub import errors, get_token

    token = get_token() or ""
    # The library's message about a header with such characters would contain the token.
    if not (token.isascii() and token.isprintable()):
        raise SaetrainError("the token of the hub contains characters that no token has; set HF_TOKEN, or log in again")
    try:
        yield
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        message = _describe_hub_error(repo, cause)
        raise SaetrainError(message.replace(token, "…") if token else message) from error


def _describe_hub_error(repo: str, error: BaseException) -> str:
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        return f"{repo}: is gated: accept its terms on the hub and set HF_TOKEN to a token that has access"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo}: has no such revision; pass a branch, a tag or a commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo}: there is no local folder of that name, and it is not on the hub (or it is private: log in with "
            "`hf auth login`, or set HF_TOKEN to a token that has access)"
        )
    if status == 401:
        return f"{repo}: the hub refuses the token; log in again with `hf auth login`, or set HF_TOKEN to a valid token"
    if status == 403:
        return f"{repo}: the token has no permission for that; use a token that may write to {repo.partition('/')[0]}"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return (
            f"{repo}: there is no local folder of that name, it is not (completely) in the local cache, and the hub "
            "can't be reached (no network?)"
        )
    detail = str(error).strip().splitlines() or [type(error).__name__]
    if status is None and isinstance(error, errors.HTTPError):
        return f"{repo}: the connection to the hub failed ({detail[0]}); try again"
    return f"{repo}: the hub's answer is an error: {detail[0]}" if status else f"{repo}: {detail[0]}"


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

"""The hub is looked for once, briefly, and only where the local caches lack something."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import datasets.config
import pytest
from huggingface_hub import constants

from saetrain import hub
from saetrain.errors import SaetrainError


@pytest.fixture
def listener(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A port on this machine that takes connections, in the hub's place."""
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    return server


def test_reachable_where_a_connection_opens(listener: socket.socket) -> None:
    assert hub.is_hub_reachable()
    hub.require_hub("model 'x'")
    listener.close()
    # The answer of the run's first question stands.
    assert hub.is_hub_reachable()
    hub.is_hub_reachable.cache_clear()
    assert not hub.is_hub_reachable()


def test_not_reachable_when_the_user_says_offline(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.is_hub_reachable()
    listener.close()


def test_a_proxy_is_asked_in_the_hub_s_place(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    assert hub.is_hub_reachable()
    listener.close()


def test_a_name_server_that_never_answers_is_not_waited_for(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    # A resolver that hangs cannot be had at will; a socket's own time limit does not hold for it.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: done.wait(60) and [])
    start = time.monotonic()
    assert not hub.is_hub_reachable(timeout_s=0.2)
    done.set()
    assert time.monotonic() - start < 15


def test_what_the_caches_lack_is_fetched_once(listener: socket.socket) -> None:
    tries: list[bool] = []

    def load(error: Callable[[], Exception]) -> str:
        tries.append(constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE)
        if tries[-1]:
            raise error()
        return "fetched"

    assert hub.load_cached_or_fetch("x", lambda: load(OSError)) == "fetched"
    assert tries == [True, False]
    # A file that is there and broken is no reason to go to the network.
    with pytest.raises(RuntimeError):
        hub.load_cached_or_fetch("x", lambda: load(RuntimeError))
    assert tries == [True, False, True]
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE
    listener.close()


def test_without_a_hub_the_error_names_what_is_missing(hub_cache: Path) -> None:
    with pytest.raises(SaetrainError, match=r"^model 'x' is neither a local path nor"):
        hub.require_hub("model 'x'")


@pytest.mark.parametrize("name", ["./no/such", "/no/such/folder", "data/missing.jsonl", "missing.txt", "a/b/c"])
def test_what_is_spelt_like_a_path_is_no_hub_id(name: str) -> None:
    with pytest.raises(SaetrainError, match=rf"data set '{name}': no such file or folder"):
        hub.refuse_missing_path("data set", name)


@pytest.mark.parametrize("name", ["wikitext", "owner/name", "owner/name-v1.5"])
def test_hub_ids_are_let_through(name: str) -> None:
    hub.refuse_missing_path("data set", name)


def test_the_nearest_neighbour_is_named(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").touch()
    with pytest.raises(SaetrainError, match=r"Did you mean corpus\.jsonl"):
        hub.refuse_missing_path("data set", str(tmp_path / "corpsu.jsonl"))

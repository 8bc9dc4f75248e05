"""A machine without a network, and the hub's caches laid down by hand."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from saetrain import hub

COMMIT = "0123456789" * 4


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty hub cache; the libraries believe in a network, but the hub's name does not resolve."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "prepared"))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub.is_hub_reachable.cache_clear()
    yield tmp_path / "hub"
    hub.is_hub_reachable.cache_clear()


def lay_down(cache: Path, kind: str, owner: str, name: str, folder: Path) -> Path:
    """Put ``folder`` into the hub's cache as a downloaded repository; gives its snapshot."""
    repo = cache / f"{kind}--{owner}--{name}"
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return repo / "snapshots" / COMMIT


@pytest.fixture
def cached_dataset(hub_cache: Path, two_configs: Path) -> Path:
    """Snapshot of data set someone/else, downloaded before."""
    return lay_down(hub_cache, "datasets", "someone", "else", two_configs)


@pytest.fixture
def cached_model(hub_cache: Path, tiny_bert: str) -> str:
    """Hub name of a model that was downloaded before."""
    lay_down(hub_cache, "models", "someone", "tiny-bert", Path(tiny_bert))
    return "someone/tiny-bert"

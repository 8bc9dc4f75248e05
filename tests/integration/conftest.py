"""A place that a test may spoil, and a disk that fills."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest

BASE = "--k 4 --num_latents 64 --batch_size 2 --ctx_len 32 --eval_tokens 500 --assess false --max_tokens 640"


class Place:
    """A working folder with a model and a text, to be spoilt."""

    def __init__(self, folder: Path, bert: str, text: str) -> None:
        self.folder = folder
        self.allowed: set[Path] = set()
        self.model, self.text = str(folder / "model"), str(folder / "text.jsonl")
        shutil.copytree(bert, self.model)
        shutil.copy(text, self.text)

    def config(self, **changes: object) -> None:
        path = Path(self.model) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="session")
def few_topics_jsonl(tmp_path_factory: pytest.TempPathFactory, topics: list[str]) -> str:
    """A part of the texts, for runs that read a stream several times."""
    path = tmp_path_factory.mktemp("text") / "few.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in topics[:25]))
    return str(path)


@pytest.fixture
def place(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> Place:
    return Place(tmp_path, tiny_bert, topics_jsonl)


def limit_file_size(size: int) -> None:
    """Let this process write at most ``size`` bytes to any file, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

"""A hub that answers with refusals: a real HTTP server on this machine, asked through the real libraries."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REFUSALS = {
    "gated": (403, "GatedRepo", "Access to this model is restricted and you are not in the authorized list."),
    "private": (401, "RepoNotFound", "Repository not found"),
}
SECRET = "hf_" + "abcdefghij" * 3


class Refusing(BaseHTTPRequestHandler):
    """Refuses every file as the hub refuses gated and private repositories."""

    def answer(self) -> None:
        status, code, message = REFUSALS["gated" if "gated" in self.path else "private"]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, *words: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(hub: str, home: Path, *words: str) -> str:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": SECRET}
    command = [sys.executable, "-m", "saetrain", *words, "--save_dir", str(home / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stdout + done.stderr, "no token in what is printed"
    return next(line for line in done.stderr.splitlines() if line.startswith("saetrain: error: "))


def test_gated_and_private_models(hub: str, tmp_path: Path, topics_jsonl: str) -> None:
    gated = run(hub, tmp_path, "owner/gated-model", topics_jsonl)
    assert "gated" in gated.replace("gated-model", "")
    for message in (gated, run(hub, tmp_path, "owner/private-model", topics_jsonl)):
        assert "HF_TOKEN" in message


def test_gated_and_private_data_sets(hub: str, tmp_path: Path, tiny_bert: str) -> None:
    for name in ("owner/gated-text", "owner/private-text"):
        message = run(hub, tmp_path, tiny_bert, name, "--ctx_len", "32")
        assert name in message
        assert "HF_TOKEN" in message

"""A hub that answers with refusals: a real HTTP server on this machine, asked through the real libraries."""

from __future__ import annotations

import json
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


PROGRAM = """
import json, sys
from saetrain.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as stop:
        print("exit code:", stop.code, file=sys.stderr)
"""
"""Several commands in one process, because the imports take long; the libraries read their variables only once."""


def test_gated_and_private_models_and_data_sets(hub: str, tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    names = [("owner/gated-model", topics_jsonl), ("owner/private-model", topics_jsonl)]
    names += [(tiny_bert, "owner/gated-text"), (tiny_bert, "owner/private-text")]
    commands = [[*both, "--ctx_len", "32", "--save_dir", str(tmp_path / "out")] for both in names]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": SECRET,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    printed = done.stderr.splitlines()
    assert [line for line in printed if line.startswith("exit code:")] == ["exit code: 2"] * 4, done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stdout + done.stderr, "no token in what is printed"
    errors = [line for line in printed if line.startswith("saetrain: error: ")]
    for (model, text), error in zip(names, errors, strict=True):
        assert (text if model == tiny_bert else model) in error
        assert "HF_TOKEN" in error
    assert "gated" in errors[0].replace("gated-model", "")

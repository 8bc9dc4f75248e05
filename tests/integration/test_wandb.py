"""Weights & Biases by its real offline mode, read back from the file that it writes."""

from __future__ import annotations

import json
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.integration.test_resume import SETTINGS, STEPS, finish, records, start, wait_for_step

BLOCK = 32 * 1024


def messages(path: Path) -> Iterator[bytes]:
    """The messages of a ``.wandb`` file: LevelDB's log format behind a header of 7 bytes.

    A run that was killed leaves a message cut short at the end.
    """
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data) or kind == 0:
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def read(path: Path) -> tuple[str, list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """(run id, history rows, summary, config) of an offline run."""
    from wandb.proto import wandb_internal_pb2

    run_id, rows, summary, config = "", [], {}, {}
    for message in messages(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.run.run_id:
            run_id = record.run.run_id
            config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        if record.history.item:
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
        for item in record.summary.update:
            summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return run_id, rows, summary, config


def points(rows: list[dict[str, Any]], key: str) -> dict[int, float]:
    found = [(row["step"], row[key]) for row in rows if key in row]
    assert len(found) == len(dict(found)), "a step was logged twice"
    return dict(found)


def test_a_killed_and_resumed_run_is_one_run_with_every_figure_once(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    words = [tiny_bert, topics_jsonl, *SETTINGS.split(), "--log_to_wandb", "true", "--wandb_log_frequency", "20"]
    environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": "secret-key-of-mine-0123456789abcdef01234567"}
    process = start(tmp_path, "run", words, **environment)
    wait_for_step(process, tmp_path / "run", 130)
    process.send_signal(signal.SIGTERM)
    finish(process)
    finish(start(tmp_path, "run", [*words, "--resume"], **environment))
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    (first_id, first, _, config), (second_id, second, summary, _) = map(read, files)
    assert first_id == second_id
    key = "train/encoder.layer.0/fvu"
    expected = {
        r["step"]: r["saes"]["encoder.layer.0"]["fvu"] for r in records(tmp_path / "run") if r["kind"] == "train"
    }
    assert points(first + second, key) == {step: expected[step] for step in range(20, STEPS + 1, 20)}
    final = next(r for r in records(tmp_path / "run") if r["kind"] == "final")
    assert summary["final/encoder.layer.0/fvu"] == final["saes"]["encoder.layer.0"]["fvu"]
    assert config["num_latents"] == 64
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"secret-key-of-mine" not in path.read_bytes(), path


def test_no_key_and_no_server_are_said_with_the_way_out(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    words = [tiny_bert, topics_jsonl, *SETTINGS.split(), "--log_to_wandb", "true"]
    without_key = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    no_server = {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "4",
    }
    for name, environment in (("key", without_key), ("server", no_server)):
        output = finish(start(tmp_path, name, words, **environment), code=2)
        assert "--log_to_wandb true: Weights & Biases could not start a run" in output
        assert "WANDB_MODE=offline" in output
        assert "Traceback" not in output

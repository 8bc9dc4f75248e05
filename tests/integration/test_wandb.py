"""Weights & Biases by its real offline mode, read back from the file that it writes."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import wandb

from tests.integration.test_resume import SETTINGS, STEPS, records, start, steps_done, wait_for_step
from tests.processes import finish

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


OFFLINE = {"WANDB_MODE": "offline", "WANDB_API_KEY": "secret-key-of-mine-0123456789abcdef01234567"}


def test_a_stopped_and_resumed_run_is_one_run_with_every_figure_once(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    words = [tiny_bert, topics_jsonl, *SETTINGS.split(), "--log_to_wandb", "true", "--wandb_log_frequency", "20"]
    process = start(tmp_path, "run", words, **OFFLINE)
    wait_for_step(process, tmp_path / "run", 130)
    process.send_signal(signal.SIGTERM)
    finish(process)
    finish(start(tmp_path, "run", [*words, "--resume"], **OFFLINE))
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


def test_a_run_that_is_killed_twice_logs_no_step_twice(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    """The second kill comes before the step of the first, whose figures the metrics file then no longer holds."""
    words = [tiny_bert, topics_jsonl, *SETTINGS.split(), "--log_to_wandb", "true", "--wandb_log_frequency", "3"]
    words += ["--log_every", "7", "--save_every", "100"]
    run, reached = tmp_path / "run", []
    wandb.teardown()
    wandb.setup().ensure_service()
    assert "WANDB_SERVICE" in os.environ, "a service that outlives the kills, as a notebook's does"
    # wandb writes what it was given to its file every 15 seconds, which a test of a few seconds would not see.
    environment = {**OFFLINE, "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.1"}
    for step, more in ((160, []), (105, ["--resume"])):
        process = start(tmp_path, "run", [*words, *more], **environment)
        # Until then the metrics of the first start may still be there in full.
        process.wait_for_match("^filling")
        wait_for_step(process, run, step)
        process.kill()
        process.wait()
        reached.append(steps_done(run))
    assert 100 < reached[1] < reached[0] - 10 < 190, f"killed at steps {reached}: too late for what is tried"
    finish(start(tmp_path, "run", [*words, "--resume"], **environment))
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    (first_id, first, *_), (second_id, second, *_), (third_id, third, summary, _) = map(read, files)
    assert first_id == second_id == third_id
    key = "train/encoder.layer.0/fvu"
    logged = [points(rows, key) for rows in (first, second, third)]
    assert reached[1] < max(logged[0]), "what the last start computes again was logged"
    together = points(first + second + third, key)
    assert list(together) == sorted(together)
    # A line of the metrics comes every 7 steps, so the first start had done at most 6 more, and one under way.
    wanted, known = {*range(3, STEPS + 1, 3), STEPS}, reached[0] + 7
    assert set(together) <= wanted
    assert {step for step in together if step > known} == {step for step in wanted if step > known}
    evaluated = [row["step"] for row in first + second + third if "eval/encoder.layer.0/fvu" in row]
    assert len(evaluated) == len(set(evaluated))
    final = next(r for r in records(run) if r["kind"] == "final")
    assert summary["final/encoder.layer.0/fvu"] == final["saes"]["encoder.layer.0"]["fvu"]


def test_no_key_and_no_server_are_said_with_the_way_out(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    words = [tiny_bert, topics_jsonl, *SETTINGS.split(), "--log_to_wandb", "true"]
    without_key = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    no_server = {
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "4",
    }
    output = finish(start(tmp_path, "time", words, **OFFLINE, WANDB_INIT_TIMEOUT="soon"), code=2)
    assert "error: WANDB_INIT_TIMEOUT 'soon': must be a number of seconds" in output
    for name, environment in (("key", without_key), ("server", no_server)):
        output = finish(start(tmp_path, name, words, **environment), code=2)
        assert "--log_to_wandb true: Weights & Biases could not start a run" in output
        assert "WANDB_MODE=offline" in output
        assert "Traceback" not in output


def test_a_stuck_service_does_not_keep_a_refused_run_from_ending(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    words = [tiny_bert, topics_jsonl, *SETTINGS.split(), "--log_to_wandb", "true"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = start(tmp_path, "run", words, WANDB_MODE="online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL=url)
        silent.settimeout(120)
        silent.accept()
        services = [child for child in psutil.Process(process.pid).children() if "wandb-core" in child.name()]
        assert services
        for service in services:
            service.suspend()
        output = finish(process, code=2)
    assert "Weights & Biases could not start a run" in output
    assert "Traceback" not in output
    # The parent of an orphan may not reap it, so a killed process can remain as a zombie.
    _, alive = psutil.wait_procs(services, timeout=10)
    assert all(service.status() == psutil.STATUS_ZOMBIE for service in alive)


def test_training_goes_on_when_its_process_dies(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    # Long enough that it is not done before its child is found and killed.
    steps = 4 * STEPS
    words = [tiny_bert, topics_jsonl, *SETTINGS.split(), "--log_to_wandb", "true", "--wandb_log_frequency", "5"]
    words += ["--max_tokens", str(steps * 128), "--save_every", str(steps), "--eval_every", "0"]
    process = start(tmp_path, "run", words, **OFFLINE)
    wait_for_step(process, tmp_path / "run", 100)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "wandb-core" in child.name():
            child.kill()
    output = finish(process)
    assert output.count("Weights & Biases has stopped answering") == 1
    assert [r["step"] for r in records(tmp_path / "run") if r["kind"] == "train"] == list(range(1, steps + 1))

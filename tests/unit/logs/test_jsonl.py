"""A resumed run keeps the records up to its checkpoint, whatever else ``metrics.jsonl`` contains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saetrain.errors import SaetrainError
from saetrain.logs.base import MetricsRecord, RunInfo
from saetrain.logs.jsonl import METRICS_FILE, JsonLinesSink, read_records


def open_sink(folder: Path, resumed_step: int | None) -> JsonLinesSink:
    return JsonLinesSink(RunInfo(folder, "run", {}, 10, resumed_step, {}), 1)


def write_records(folder: Path, steps: range) -> None:
    sink = open_sink(folder, None)
    for step in steps:
        sink.write(MetricsRecord("train", step, 64 * step, {"tokens_per_second": 1.5}, {"h.0": {"fvu": float("nan")}}))
    sink.write(MetricsRecord("final", steps[-1], 64 * steps[-1], {}, {"h.0": {"fvu": 0.5}}))
    sink.close(failed=False)


def test_records_after_the_checkpoint_and_final_ones_are_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(tmp_path, range(1, 9))
    whole = (tmp_path / METRICS_FILE).read_text().splitlines(keepends=True)
    (tmp_path / METRICS_FILE).write_text("".join(whole) + '{"kind": "train", "st')
    open_sink(tmp_path, 5).close(failed=False)
    assert (tmp_path / METRICS_FILE).read_text() == "".join(whole[:5])
    assert not capsys.readouterr().err, "a line that a crash cut short is not damage"


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\x00",
        b'{"kind": "train", "step": 3, "tokens": 192, "saes": {"\xff": {}}}',
        b"",
        b"12",
        b"null",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"kind": "train"}',
        b'{"kind": "train", "step": "3", "tokens": 192, "saes": {}}',
        b'{"kind": "train", "step": 3.5, "tokens": 192, "saes": {}}',
        b'{"kind": ["train"], "step": 3, "tokens": 192, "saes": {}}',
        b'{"kind": "train", "step": 3, "tokens": 192, "saes": {"h.0": {"fvu": "low"}}}',
        b'{"kind": "train", "step": 3, "tokens": 192, "saes": []}',
        b'{"kind": "train", "step": 3, "step": 4, "tokens": 192, "saes": {}}',
        b'{"kind": "train", "step": 3, "tokens": 192, "saes": {}, "extra": ' + b"[" * 100 + b"]" * 100 + b"}",
    ],
)
def test_what_is_no_record_is_deleted_with_one_line(
    line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(tmp_path, range(1, 5))
    path = tmp_path / METRICS_FILE
    before = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([line, *before[:2], line, *before[2:]]))
    open_sink(tmp_path, 4).close(failed=False)
    assert path.read_bytes() == b"".join(each + b"\n" for each in before[:4])
    assert [json.loads(each)["step"] for each in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert f"{path}: 2 damaged lines are deleted" in capsys.readouterr().err


def test_the_records_are_read_without_a_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    assert read_records(tmp_path / METRICS_FILE) == []
    write_records(tmp_path, range(1, 3))
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"kind": "train", "st')
    records = read_records(tmp_path / METRICS_FILE)
    assert [(record.kind, record.step, record.tokens_per_second) for record in records] == [
        ("train", 1, 1.5),
        ("train", 2, 1.5),
        ("final", 2, None),
    ]
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write("\n")
    with pytest.raises(SaetrainError, match=r"metrics\.jsonl: line 4 is invalid; remove that line"):
        read_records(tmp_path / METRICS_FILE)

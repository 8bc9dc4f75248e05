"""``metrics.jsonl``: one line per record, without duplicate or missing steps, even after a crash."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from saetrain.atomic_io import fsync_dir, replace_non_finite, write_atomic
from saetrain.errors import SaetrainError
from saetrain.logs.base import FINAL_KINDS, MetricsRecord, RunInfo, Sink
from saetrain.logs.console import log_rank0
from saetrain.small_files import parse_json

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StoredRecord:
    """A line as :meth:`JsonLinesSink.write` writes it; other metrics of the run are further keys."""

    kind: str
    step: int
    tokens: int
    saes: dict[str, dict[str, float | None]]
    tokens_per_second: float | None = None


class JsonLinesSink(Sink):
    """Append records to ``metrics.jsonl``.

    A resumed run first removes the records after its checkpoint. A new run first renames an existing file.
    """

    def __init__(self, info: RunInfo, every_n_steps: int) -> None:
        super().__init__(every_n_steps, info.total_steps)
        path = info.run_dir / METRICS_FILE
        if info.resumed_step is not None and path.exists():
            write_atomic(path, b"".join(_read_lines_up_to_step(path, info.resumed_step)))
        elif path.exists() and path.stat().st_size:
            _set_aside_metrics(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def write(self, record: MetricsRecord) -> None:
        """Write the record as one JSON object; values that are not finite become null, because JSON has no NaN."""
        line = {
            "kind": record.kind,
            "step": record.step,
            "tokens": record.tokens,
            **replace_non_finite(record.run_metrics),
            "saes": {name: replace_non_finite(metrics) for name, metrics in record.sae_metrics.items()},
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def sync_to_disk(self) -> None:
        """Sync the file to disk."""
        os.fsync(self._file.fileno())

    def close(self, failed: bool) -> None:
        """Close the file; after a failure, ignore errors, because the cause is already reported."""
        try:
            self._file.close()
        except OSError:
            if not failed:
                raise


def list_earlier_metrics(directory: Path) -> list[Path]:
    """Return the metrics files of earlier starts in ``directory``: ``metrics.jsonl.1`` and so on."""
    return sorted(path for path in directory.glob(f"{METRICS_FILE}.*") if path.suffix[1:].isdecimal())


def _set_aside_metrics(path: Path) -> None:
    """Rename the metrics of an earlier start, for example of a run whose checkpoints were deleted."""
    number = 1 + max((int(old.suffix[1:]) for old in list_earlier_metrics(path.parent)), default=0)
    old = path.with_name(f"{METRICS_FILE}.{number}")
    os.replace(path, old)
    fsync_dir(path.parent)
    log_rank0(f"the metrics of the earlier start are kept in {old}")


def read_records(path: Path) -> list[StoredRecord]:
    """Return the records of a metrics file, or [] if it does not exist.

    Raises SaetrainError that names a line that is no record.
    """
    records = []
    for number, (_, record) in enumerate(_iterate_lines(path) if path.exists() else (), 1):
        if record is None:
            raise SaetrainError(f"{path}: line {number} is invalid; remove that line")
        records.append(record)
    return records


def _read_lines_up_to_step(path: Path, step: int) -> list[bytes]:
    """Return the lines of records up to ``step``, without final records; log how many lines are no records."""
    lines = list(_iterate_lines(path))
    n_damaged = sum(record is None for _, record in lines)
    if n_damaged:
        log_rank0(f"{path}: {n_damaged:,} damaged lines are deleted")
    return [line + b"\n" for line, record in lines if record and record.step <= step and record.kind not in FINAL_KINDS]


def _iterate_lines(path: Path) -> Iterator[tuple[bytes, StoredRecord | None]]:
    """Yield (line, its record, or None if it has none) of each whole line; SaetrainError if ``path`` is no file."""
    if not path.is_file():
        raise SaetrainError(f"{path}: is not a regular file")
    # What follows the last line break was cut short by a crash, or is still being written.
    *lines, _ = path.read_bytes().split(b"\n")
    for line in lines:
        record = None
        with contextlib.suppress(SaetrainError):
            record = parse_json(line, METRICS_FILE, StoredRecord)
        yield line, record

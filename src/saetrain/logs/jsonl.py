"""``metrics.jsonl``: one line per record, without duplicate or missing steps, even after a crash."""

from __future__ import annotations

import json
import os
from pathlib import Path

from saetrain.atomic_io import fsync_dir, replace_non_finite, write_atomic
from saetrain.logs.base import FINAL_KINDS, MetricsRecord, RunInfo, Sink
from saetrain.logs.console import log_rank0

METRICS_FILE = "metrics.jsonl"


class JsonLinesSink(Sink):
    """Append records to ``metrics.jsonl``.

    A resumed run first removes the records after its checkpoint. A new run first renames an existing file.
    """

    def __init__(self, info: RunInfo, every_n_steps: int) -> None:
        super().__init__(every_n_steps, info.total_steps)
        path = info.run_dir / METRICS_FILE
        if info.resumed_step is not None and path.exists():
            write_atomic(path, "".join(_lines_up_to_step(path.read_text(), info.resumed_step)))
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


def _lines_up_to_step(text: str, step: int) -> list[str]:
    """Return the lines of ``text`` up to ``step``, without final records and lines that a crash cut short."""
    kept = []
    for line in text.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= step and line.endswith("\n") and record["kind"] not in FINAL_KINDS:
            kept.append(line)
    return kept
